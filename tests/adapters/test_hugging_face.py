"""Hugging Face's models with the library's attention: losses, gradients and tokens are those of their own."""

import re

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed, which the tests do not require")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed, which the tests do not require"
)

import lingrad_rs as lg  # noqa: E402
import lingrad_rs.torch as lgt  # noqa: E402
from lingrad_rs.torch import hugging_face  # noqa: E402
from lingrad_rs.torch.masks import Structure  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

# Sums in float32 in another order, through two layers; gradients that are 0 but for rounding are held against 1e-4.
LIMIT = 2e-5
SMALL = 1e-4

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
GPT2 = {
    "vocab_size": 64,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "loss_type": "ForCausalLM",
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MODELS = {
    "llama": ("Llama", SIZES, {}),
    "mistral, of a sliding window": ("Mistral", SIZES, {"sliding_window": 5}),
    "gemma2, of softcaps": (
        "Gemma2",
        SIZES,
        {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "gpt-oss, of sinks": (
        "GptOss",
        SIZES,
        {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": YARN},
    ),
    "qwen2": ("Qwen2", SIZES, {}),
    "gpt2": ("GPT2", GPT2, {}),
}
TOKENS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _registered():
    lgt.register_hugging_face("lingrad")


@pytest.fixture
def calls(monkeypatch):
    """The options of each call of the library."""
    seen, attention = [], lg.attention

    def look(*arrays, **options):
        seen.append(options)
        return attention(*arrays, **options)

    monkeypatch.setattr(lg, "attention", look)
    return seen


def model_of(name, implementation):
    """A small model with weights large enough for attention to matter."""
    family, sizes, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**sizes, **options, attn_implementation=implementation)
    torch.manual_seed(0)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            if parameter_name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()))
    return model


def batch_of(kind):
    """Tokens, labels and what else a model is called with."""
    tokens, labels, options = TOKENS, TOKENS.clone(), {}
    if kind in ("left", "right"):
        mask = torch.ones_like(tokens)
        if kind == "left":
            mask[0, :5] = 0
            # Padding predicts nothing; rows that see no key are 0 here, and means of values elsewhere.
            labels[0, 5] = -100
        else:
            mask[0, -5:] = 0
        options["attention_mask"] = mask
        labels[mask == 0] = -100
    if kind == "packed":
        tokens, labels = tokens[:1], labels[:1]
        options["position_ids"] = torch.cat([torch.arange(6), torch.arange(11)])[None]
    return {"input_ids": tokens, "labels": labels, **options}


def loss_and_gradients(model, batch):
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: x.grad for name, x in model.named_parameters() if x.grad is not None}}


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        error = float((got[name] - x).norm() / max(float(x.norm()), SMALL))
        assert error <= LIMIT, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_those_of_eager_attention(name, kind, calls):
    batch = batch_of(kind)
    want = loss_and_gradients(model_of(name, "eager"), batch)
    got = loss_and_gradients(model_of(name, "lingrad"), batch)
    assert_close(got, want)
    assert not any("sinks" in x and not grad.any() for x, grad in got.items())
    assert len(calls) == 2
    for options in calls:
        assert not {"mask", "bias"} & options.keys(), "a mask of n x m was made"
        assert ("key_bias" in options) == (kind in ("left", "right"))
        # GPT-OSS does not tell its masks of positions.
        assert ("segment_ids" in options) == (kind == "packed" and name != "gpt-oss, of sinks")
    print(f"{name}, {kind}: the loss and {len(want) - 1} gradients")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["plain", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_are_those_of_eager_attention(name, kind, cache):
    mask = batch_of(kind).get("attention_mask", torch.ones_like(TOKENS))
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"
    want, got = (model_of(name, x).eval().generate(TOKENS, **options) for x in ("eager", "lingrad"))
    assert torch.equal(got, want)
    print(f"{name}, {kind}, {cache} cache: {got.shape[1] - TOKENS.shape[1]} tokens of {len(got)} rows")


def test_a_model_that_sees_both_ways_gives_its_own_results(calls):
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    results = []
    for implementation in ("eager", "lingrad"):
        torch.manual_seed(0)
        config_of_model = transformers.BertConfig(**config, attn_implementation=implementation)
        results.append(loss_and_gradients(BertForTests(config_of_model), batch_of("right")))
    assert_close(*results[::-1])
    assert len(calls) == 2
    assert all(not options["causal"] and "key_bias" in options and "mask" not in options for options in calls)


class BertForTests(transformers.BertForMaskedLM):
    def forward(self, *, use_cache, **batch):
        return super().forward(**batch)


def test_forty_steps_of_training_follow_pytorch_s_attention():
    curves = []
    for implementation in ("sdpa", "lingrad"):
        model = model_of("llama", implementation)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        losses = []
        for _ in range(40):
            loss = model(**batch_of("right"), use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < 0.8 * curves[0][0]
    error = float((curves[1] / curves[0] - 1).abs().max())
    print(f"40 steps: losses {float(curves[0][0]):.3f} to {float(curves[0][-1]):.3f}, at most {error:.1e} apart")
    assert error <= 1e-5


def test_a_checkpointed_model_has_the_same_gradients():
    batch = batch_of("left")
    want = loss_and_gradients(model_of("gemma2, of softcaps", "eager"), batch)
    model = model_of("gemma2, of softcaps", "lingrad")
    model.train()
    model.gradient_checkpointing_enable()
    assert_close(loss_and_gradients(model, batch), want)


def test_a_compiled_model_has_the_same_loss():
    torch._dynamo.reset()
    batch = batch_of("left")
    want = model_of("llama", "eager")(**batch, use_cache=False).loss
    got = torch.compile(model_of("llama", "lingrad"), backend="aot_eager")(**batch, use_cache=False).loss
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["llama", "gemma2, of softcaps"])
def test_a_static_cache_is_filled_without_a_mask_of_all_pairs(name, calls):
    mask = batch_of("left")["attention_mask"]
    model = model_of(name, "lingrad").eval()
    model.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert len(calls) == 8
    assert not any("mask" in options for options in calls)
    assert sum("key_bias" in options for options in calls) >= 4  # of other layers, no window reaches the padding


def test_decoding_with_a_static_cache_compiles_whole():
    torch._dynamo.reset()
    model = model_of("llama", "lingrad").eval()
    results = []
    for forward in (model.forward, torch.compile(model.forward, fullgraph=True, backend="aot_eager")):
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(input_ids=TOKENS, past_key_values=cache)
            results.append(
                torch.cat([forward(input_ids=x, past_key_values=cache).logits for x in TOKENS.T[:3, :, None]])
            )
    torch.testing.assert_close(*results)


def test_a_mask_of_a_user_s_own_is_served(calls):
    mask = (torch.rand(2, 1, 17, 17) > 0.3) | torch.eye(17, dtype=torch.bool)
    bias = torch.zeros(2, 1, 17, 17).masked_fill(~mask, torch.finfo(torch.float32).min)
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    want = loss_and_gradients(model_of("llama", "eager"), batch | {"attention_mask": bias})
    assert_close(loss_and_gradients(model_of("llama", "lingrad"), batch | {"attention_mask": mask}), want)
    assert_close(loss_and_gradients(model_of("llama", "lingrad"), batch | {"attention_mask": bias}), want)
    assert ["mask" in options for options in calls] == [True, True, False, False]


def test_a_mask_that_is_not_understood_is_made_pair_by_pair(calls):
    from transformers.masking_utils import create_causal_mask

    model = model_of("llama", "lingrad")

    def only_even_keys(batch, head, query, key):
        return (key % 2 == 0) | (key == query)

    def masks(**options):
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=torch.zeros(2, 17, 32),
            attention_mask=None,
            cache=None,
            and_mask_function=only_even_keys,
        )
        assert isinstance(mask, torch.Tensor)
        return mask

    i = torch.arange(17)
    want = (i[None, :] <= i[:, None]) & (((i % 2) == 0)[None, :] | (i[None, :] == i[:, None]))
    assert torch.equal(masks(), want.expand(2, 1, 17, 17))


def bools_of(options, batch, n, m):
    """The mask that a structure's options mean, pair by pair."""
    at = torch.arange(n)[:, None] + options.get("query_offset", 0)
    key = torch.arange(m)[None, :]
    left, right = options.get("window") or (None, None)
    sees = torch.ones(batch, 1, n, m, dtype=torch.bool)
    if options["causal"]:
        sees &= key <= at
    if left is not None:
        sees &= key >= at - left
    if right is not None:
        sees &= key <= at + right
    if "key_bias" in options:
        sees &= options["key_bias"][:, :, None, :]
    if "segment_ids" in options:
        ids = options["segment_ids"]
        assert (ids.diff() >= 0).all()
        sees &= (ids[:, :, None] == ids[:, None, :])[:, None]
    return sees


def test_the_structure_of_a_mask_says_what_the_mask_does():
    """Of functions that transformers has, with what it does to them, for caches that are empty, filled and turning."""
    masking = pytest.importorskip("transformers.masking_utils")
    packed = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    functions = {
        "causal": masking.causal_mask_function,
        "both ways": masking.bidirectional_mask_function,
        "window": masking.sliding_window_causal_mask_function(4),
        "window both ways": masking.sliding_window_bidirectional_mask_function(2),
        "chunks": masking.chunked_causal_mask_function(4, torch.tensor([0, 3])),
    }
    for name in ("causal", "window"):
        functions[f"packed, {name}"] = masking.and_masks(
            masking.remap_positions_for_packed_sequence(functions[name], position_ids),
            masking.packed_sequence_mask_function(packed),
        )
    paddings = {
        "none": None,
        "left": torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]]),
        "right": torch.tensor([[1] * 9, [1, 1, 1, 1, 1, 1, 0, 0, 0]]),
    }
    # n, m, and the positions of query 0 and key 0: of 9 tokens, of a part, of a cache, of one that turns, of more room.
    sizes = [(9, 9, 0, 0), (4, 9, 5, 0), (1, 9, 8, 0), (2, 5, 7, 4), (9, 12, 0, 0)]
    structures = 0
    for name, function in functions.items():
        for n, m, q_offset, kv_offset in sizes:
            if "packed" in name and (n, m) != (9, 9):
                continue
            for padding in paddings.values():
                made = hugging_face._mask(
                    masking,
                    batch_size=2,
                    q_length=n,
                    kv_length=m,
                    q_offset=q_offset,
                    kv_offset=kv_offset,
                    mask_function=function,
                    attention_mask=padding if padding is None else padding.bool(),
                )
                if isinstance(made, Structure):
                    structures += 1
                    assert torch.equal(bools_of(made.options, 2, n, m), made.dense()), (name, n, m)
                else:
                    assert name == "chunks"
                    assert n != m
    print(f"{structures} masks as structure")
    assert structures >= 60


def test_a_name_with_another_meaning_is_noticed(monkeypatch, calls):
    """A later release of transformers may change what a function of a known name says."""
    from transformers import masking_utils

    def sliding_window_overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window

        inner_mask.__module__ = "transformers.masking_utils"
        inner_mask.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
        return inner_mask

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", sliding_window_overlay)
    model_of("mistral, of a sliding window", "lingrad")(input_ids=TOKENS, use_cache=False)
    assert all("mask" in options for options in calls)


def test_a_structure_is_the_tensor_where_one_is_needed():
    dense = torch.rand(2, 1, 5, 5) > 0.5
    structure = Structure({"causal": True}, lambda: dense, dense.shape)
    assert torch.equal(structure[..., :3], dense[..., :3])
    assert (structure.shape, structure.dtype, structure.ndim) == (dense.shape, torch.bool, 4)
    assert torch.equal(torch.logical_not(structure), ~dense)
    assert torch.equal(torch.where(structure, 1.0, 0.0), dense.float())


def test_what_each_head_chose_is_reported(monkeypatch):
    class Vjp:
        heads = ("a", "b", "c", "d") * 2

    monkeypatch.setattr(lg, "attention_vjp", lambda *arrays, **options: (None, Vjp()))
    attention = lg.attention
    monkeypatch.setattr(lg, "attention", lambda *a, **options: attention(*a, **(options | {"engine": lg.Exact()})))
    told = []
    lgt.register_hugging_face("lingrad-tol", tol=1e-2, report=told.append)
    model_of("llama", "lingrad-tol")(input_ids=TOKENS, use_cache=False)
    assert told == [Vjp.heads] * 2


@pytest.mark.parametrize("kind", ["left", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_tolerance_serves_every_model_and_tells_of_every_head(name, kind):
    told = []
    lgt.register_hugging_face("lingrad-within", tol=1e-3, report=told.append)
    want = loss_and_gradients(model_of(name, "eager"), batch_of(kind))
    got = loss_and_gradients(model_of(name, "lingrad-within"), batch_of(kind))
    assert got.keys() == want.keys()
    assert abs(float(got["loss"] / want["loss"]) - 1) <= 1e-2
    heads = 4 * batch_of(kind)["input_ids"].shape[0]
    assert [len(x) for x in told] == [heads] * 2


def test_an_engine_is_handed_on(calls, monkeypatch):
    engine = lg.Polynomial(degree=4)
    lgt.register_hugging_face("lingrad-polynomial", engine=engine)
    model_of("llama", "lingrad-polynomial")(input_ids=TOKENS, use_cache=False)
    assert [options["engine"] for options in calls] == [engine] * 2
    assert all(options["causal"] for options in calls)


REFUSED = {
    "dropout": ({"attention_dropout": 0.1}, {}, "dropout is 0.1; expected 0.0"),
    "weights": ({}, {"output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize(("config", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_is_told(config, options, message):
    config = transformers.LlamaConfig(**(SIZES | config), attn_implementation="lingrad")
    model = transformers.LlamaForCausalLM(config).train()
    with pytest.raises(ValueError, match=re.escape(message)):
        model(input_ids=TOKENS, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": ""}, lg.ArgumentError, "name is ''"),
        ({"tol": 2.0}, lg.ToleranceError, "tol is 2.0"),
        ({"engine": lg.Exact(), "tol": 0.1}, lg.ArgumentError, "expected one of them"),
        ({"report": 3}, lg.ArgumentError, "report is 3; expected a callable"),
    ],
)
def test_what_does_not_fit_is_told_when_registering(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        lgt.register_hugging_face(**options)
