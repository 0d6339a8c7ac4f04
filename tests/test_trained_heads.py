"""The decoder that reads trained models in benches/trained_heads, with small random weights."""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close, difference_error, relative_error
from limits import DIFFERENCE, ORACLE, SMALL_STEP

import lingrad_rs as lg

BENCH = Path(__file__).parent.parent / "benches" / "trained_heads"
if not BENCH.is_dir():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))
from decoder import EMBED, LAST_NORM, Config, Decoder, difference, rope_base, turned  # noqa: E402

CLOSE = ORACLE[np.dtype(np.float64)]
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7])
D, HIDDEN, VOCAB = 6, 10, 11
LLAMA = Config(
    heads=4,
    kv_heads=2,
    width=4,
    context=32,
    rope_bases=(100.0, 100.0),
    windows=(None, None),
    pairs_are_neighbours=True,
    norm_eps=1e-3,
    activation="silu",
)
GEMMA = dataclasses.replace(
    LLAMA,
    kv_heads=1,
    context=8,
    rope_bases=(10.0, 1000.0),
    windows=(5, None),
    pairs_are_neighbours=False,
    activation="gelu_tanh",
    embedding_scale=math.sqrt(D),
    norms_heads=True,
    norms_after=True,
)
BOTH = pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["as Llama", "as Gemma 3"])


def decoder_of(config):
    rng = np.random.default_rng(0)
    shapes = {
        "attn_norm": (D,),
        "attn_q": (config.heads * config.width, D),
        "attn_k": (config.kv_heads * config.width, D),
        "attn_v": (config.kv_heads * config.width, D),
        "attn_output": (D, config.heads * config.width),
        "ffn_norm": (D,),
        "ffn_gate": (HIDDEN, D),
        "ffn_up": (HIDDEN, D),
        "ffn_down": (D, HIDDEN),
    }
    if config.norms_heads:
        shapes |= {"attn_q_norm": (config.width,), "attn_k_norm": (config.width,)}
    if config.norms_after:
        shapes |= {"post_attention_norm": (D,), "post_ffw_norm": (D,)}
    named = {f"blk.{i}.{name}.weight": shape for i in range(config.layers) for name, shape in shapes.items()}
    named |= {f"{EMBED}.weight": (VOCAB, D), f"{LAST_NORM}.weight": (D,)}
    return Decoder(config, {name: 0.7 * rng.standard_normal(shape) for name, shape in named.items()})


def plain_loss(decoder, tokens):
    """The loss from the published description of such models, token by token."""
    config = decoder.config

    def w(name):
        return decoder.weights[f"{name}.weight"]

    def norm(x, name):
        return x / math.sqrt(np.mean(x**2) + config.norm_eps) * w(name)

    def turn(x, place, base):
        pairs = x.reshape(-1, 2) if config.pairs_are_neighbours else x.reshape(2, -1).T
        speeds = base ** (-2 * np.arange(config.width // 2) / config.width)
        pairs = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * place * speeds)
        pairs = np.stack([pairs.real, pairs.imag], axis=1)
        return pairs.ravel() if config.pairs_are_neighbours else pairs.T.ravel()

    def act(x):
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    xs = [config.embedding_scale * w(EMBED)[token] for token in tokens]
    for i in range(config.layers):
        queries, keys, values, base = [], [], [], config.rope_bases[i]
        if config.windows[i] is None and len(tokens) > config.context:
            base *= (len(tokens) / config.context) ** (config.width / (config.width - 2))
        for place, x in enumerate(xs):
            h = norm(x, f"blk.{i}.attn_norm")
            q, k, v = (
                np.split(w(f"blk.{i}.attn_{part}") @ h, heads)
                for part, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
            )
            if config.norms_heads:
                q, k = [norm(x, f"blk.{i}.attn_q_norm") for x in q], [norm(x, f"blk.{i}.attn_k_norm") for x in k]
            queries.append([turn(x, place, base) for x in q])
            keys.append([turn(x, place, base) for x in k])
            values.append(v)
        for place, x in enumerate(xs):
            seen = (
                range(place + 1)
                if config.windows[i] is None
                else range(max(0, place + 1 - config.windows[i]), place + 1)
            )
            out = []
            for head, q in enumerate(queries[place]):
                own = head // (config.heads // config.kv_heads)
                f = np.exp([q @ keys[j][own] / math.sqrt(config.width) for j in seen])
                out.append(sum(share * values[j][own] for share, j in zip(f / f.sum(), seen, strict=True)))
            y = w(f"blk.{i}.attn_output") @ np.concatenate(out)
            x = x + (norm(y, f"blk.{i}.post_attention_norm") if config.norms_after else y)
            h = norm(x, f"blk.{i}.ffn_norm")
            y = w(f"blk.{i}.ffn_down") @ (act(w(f"blk.{i}.ffn_gate") @ h) * (w(f"blk.{i}.ffn_up") @ h))
            xs[place] = x + (norm(y, f"blk.{i}.post_ffw_norm") if config.norms_after else y)
    logits = [w(EMBED) @ norm(x, LAST_NORM) for x in xs[:-1]]
    return np.mean([np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits, tokens[1:], strict=True)])


@BOTH
def test_the_loss_is_that_of_the_models_description(config):
    decoder = decoder_of(config)
    want = plain_loss(decoder, TOKENS)
    assert relative_error(decoder.value_and_grad(TOKENS, lg.Exact())[0], want) <= CLOSE
    assert relative_error(decoder.visit(TOKENS, {1: [0]}, lambda head: None), want) <= CLOSE


@BOTH
def test_the_gradient_of_each_weight_is_that_of_the_loss(config):
    decoder = decoder_of(config)
    _, grads = decoder.value_and_grad(TOKENS, lg.Exact())
    assert grads.keys() == decoder.weights.keys()
    rng = np.random.default_rng(1)
    for name, weight in decoder.weights.items():

        def loss(x, name=name):
            return Decoder(config, {**decoder.weights, name: x}).value_and_grad(TOKENS, lg.Exact())[0]

        assert difference_error(loss, weight, grads[name], rng, SMALL_STEP) <= DIFFERENCE, name


@BOTH
def test_a_wanted_head_has_the_queries_and_keys_of_its_layer(config):
    """Alone it attends as it does in its layer, where the engine finds its key head."""
    decoder, met = decoder_of(config), []
    loss = decoder.visit(TOKENS, {0: [2, 3]}, met.append)
    assert loss is None
    assert [head.name for head in met] == ["L0h2", "L0h3"]
    x = decoder.weights[f"{EMBED}.weight"][TOKENS] * config.embedding_scale
    arrays, _ = decoder.layer(0, lg.Exact())[0].heads(x)
    whole = lg.attention(*arrays, engine=lg.Exact(), causal=True)
    for head in met:
        alone = lg.attention(head.q, head.k, head.v, engine=lg.Exact(), causal=True)
        assert relative_error(alone, whole[head.index]) <= CLOSE


@pytest.mark.parametrize("neighbours", [True, False], ids=["neighbours", "halves"])
def test_scores_of_turned_rows_depend_on_their_distance(neighbours):
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 1, 6))
    speeds = np.array([1.0, 0.3, 0.01])

    def score(i, j):
        return turned(q, i * speeds[None], neighbours) @ turned(k, j * speeds[None], neighbours).T

    assert relative_error(score(900, 893), score(7, 0)) <= CLOSE
    assert relative_error(score(7, 0), q @ k.T) > 0.01


def test_a_longer_text_slows_the_last_pair_by_its_length_and_the_first_not_at_all():
    width, base = 8, 100.0
    assert rope_base(base, width, 32, 32) == rope_base(base, width, 32, 5) == base
    longer = rope_base(base, width, 32, 96)
    last = 2 * (width // 2 - 1) / width
    assert relative_error(longer**-last, base**-last / 3) <= CLOSE


def test_a_gradient_a_tenth_too_long_differs_by_a_tenth_and_not_in_direction():
    rng = np.random.default_rng(3)
    exact = {"a": rng.standard_normal((3, 4)), "b": rng.standard_normal(5)}
    of = difference({name: 1.1 * x for name, x in exact.items()}, exact)
    assert_close({"of": np.array([of.relative, of.cosine, *of.weights.values()])}, {"of": [0.1, 1, 0.1, 0.1]}, CLOSE)
    turned_round = difference({"a": exact["a"], "b": -exact["b"]}, exact)
    assert turned_round.weights["a"] == 0
    assert relative_error(turned_round.weights["b"], 2) <= CLOSE
    assert turned_round.cosine < 1
