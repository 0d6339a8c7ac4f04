"""The model: its parameters, its losses, what goes in and comes out, and its files."""

import dataclasses
import importlib.metadata
import json
import math
import struct

import numpy as np
import pytest
from conftest import GPU_NUMPY, RUST
from helpers import (
    assert_close,
    assert_same_bits,
    cast,
    difference_error,
    on_backend,
    on_host,
    random_params,
    relative_error,
    run_vjp,
    small_config,
)
from limits import DIFFERENCE, FLOAT32_LOSS, FLOAT32_MODEL, INIT_MEAN, INIT_STD, SAME_MODEL, SMALL_STEP, UNTRAINED_LOSS

import lingrad_rs as lg
from lingrad_rs import Exact, Polynomial
from lingrad_rs.backends import select

LARGE = lg.TransformerConfig(n_layers=3, d_model=64, n_heads=4, d_ff=256, vocab_size=256)


class Model:
    """A model on a backend, with NumPy arrays in and out."""

    def __init__(self, backend, config, params):
        self.backend, self.config, self.params = backend, config, params
        self.model = lg.Transformer(config, on_backend(backend, params))

    def vjp(self, x):
        return run_vjp(self.backend, self.model, x)

    def value_and_grad(self, tokens, targets=None, *, loss=None, progress=None):
        backend = self.backend

        def on_numpy(y):
            value, dy = loss(backend.numpy(y))
            return value, backend.array(dy)

        targets = None if targets is None else backend.array(targets)
        options = {"loss": None if loss is None else on_numpy, "progress": progress}
        value, grads = self.model.value_and_grad(backend.array(tokens), targets, **options)
        return value, on_host(backend, grads)

    def gradient_report(self, tokens, targets, **options):
        report = self.model.gradient_report(self.backend.array(tokens), self.backend.array(targets), **options)
        return dataclasses.replace(report, grads=on_host(self.backend, report.grads))


def model_and_tokens(backend, rng, *, dtype=np.float64, batch=(), n=70, **options):
    config = small_config(**options)
    tokens, targets = rng.integers(0, config.vocab_size, (2, *batch, n))
    return Model(backend, config, random_params(config, rng, dtype)), tokens, targets


def cross_entropy(targets):
    """The mean cross-entropy with its gradient, as a user would write it."""

    def loss(y):
        p = np.exp(y - y.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        at = (*np.indices(targets.shape), targets)
        value = -np.log(p[at]).mean()
        p[at] -= 1
        return value, p / targets.size

    return loss


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_parameters_have_the_documented_names_in_the_model_s_order(norm):
    def of_norm(name):
        return [f"{name}.{part}" for part in (("gain", "bias") if norm == "layer" else ("gain",))]

    want = ["embed"]
    for i in range(2):
        want += [*of_norm(f"layers.{i}.attn_norm"), *(f"layers.{i}.attn.w_{x}" for x in "qkvo")]
        want += [*of_norm(f"layers.{i}.ffn_norm"), *(f"layers.{i}.ffn.w_{x}" for x in ("in", "out"))]
    want += [*of_norm("norm"), "head"]
    model = lg.Transformer(small_config(norm=norm))
    assert list(model.params) == want
    assert list(model.config.param_shapes()) == want
    tokens = np.arange(5)
    assert list(model.value_and_grad(tokens, tokens)[1]) == want


def test_parameters_have_the_documented_shapes():
    shapes = small_config().param_shapes()
    assert {name: shapes[name] for name in shapes if "layers.1" not in name} == {
        "embed": (13, 16),
        "layers.0.attn_norm.gain": (16,),
        "layers.0.attn.w_q": (16, 16),
        "layers.0.attn.w_k": (16, 8),
        "layers.0.attn.w_v": (16, 8),
        "layers.0.attn.w_o": (16, 16),
        "layers.0.ffn_norm.gain": (16,),
        "layers.0.ffn.w_in": (16, 24),
        "layers.0.ffn.w_out": (24, 16),
        "norm.gain": (16,),
        "head": (16, 13),
    }


def test_new_weights_are_drawn_by_small_init(dtype):
    model = lg.Transformer(LARGE, dtype=dtype)
    std = math.sqrt(2 / (5 * LARGE.d_model))
    for name, x in model.params.items():
        assert x.dtype == dtype
        if name.endswith(".gain"):
            assert np.all(x == 1)
            continue
        expected = std / math.sqrt(2 * LARGE.n_layers) if name.endswith((".w_o", ".w_out")) else std
        assert abs(x.std() / expected - 1) <= INIT_STD, name
        assert abs(x.mean() / expected) <= INIT_MEAN, name


def test_new_biases_are_zero():
    params = lg.Transformer(small_config(norm="layer")).params
    biases = [x for name, x in params.items() if name.endswith(".bias")]
    assert len(biases) == 5
    assert not any(x.any() for x in biases)


def test_new_weights_depend_on_the_seed_alone():
    first, again, other = (lg.Transformer(LARGE, seed=seed).params for seed in (0, 0, 1))
    assert_same_bits(again, first)
    assert not np.array_equal(first["head"], other["head"])
    weights = [x for name, x in first.items() if x.shape == (64, 64)]
    assert not any(np.array_equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_an_untrained_model_predicts_evenly(rng):
    tokens = rng.integers(0, 256, 300)
    loss, _ = lg.Transformer(LARGE).value_and_grad(tokens, tokens)
    assert UNTRAINED_LOSS[0] <= loss <= UNTRAINED_LOSS[1]


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("engine", [Exact(), Polynomial()], ids=["exact", "polynomial"])
def test_a_user_s_cross_entropy_gives_what_the_built_in_one_gives(engine, batch, backend, rng):
    model, tokens, targets = model_and_tokens(backend, rng, batch=batch, engine=engine)
    loss, grads = model.value_and_grad(tokens, targets)
    loss_of_user, grads_of_user = model.value_and_grad(tokens, loss=cross_entropy(targets))
    y, pullback = model.vjp(tokens)
    value, dy = cross_entropy(targets)(y)
    dx, grads_of_vjp = pullback(dy)
    assert isinstance(loss, float)
    assert dx is None
    assert y.shape == (*batch, 70, 13)
    assert max(relative_error(x, loss) for x in (loss_of_user, value)) <= SAME_MODEL
    assert_close(grads_of_user, grads, SAME_MODEL)
    assert_close(grads_of_vjp, grads, SAME_MODEL)


def test_embeddings_in_place_of_tokens_give_the_same_and_their_gradient(backend, rng):
    model, tokens, targets = model_and_tokens(backend, rng, batch=(2,))
    embeddings = model.params["embed"][tokens]
    loss = cross_entropy(targets)
    y, pullback = model.vjp(embeddings)
    dx, grads = pullback(loss(y)[1])
    assert np.array_equal(y, model.vjp(tokens)[0])
    assert difference_error(lambda x: loss(model.vjp(x)[0])[0], embeddings, dx, rng, SMALL_STEP) <= DIFFERENCE
    want = model.value_and_grad(tokens, targets)[1]
    of_embed = np.zeros_like(want["embed"])
    np.add.at(of_embed, tokens, dx)
    assert not grads["embed"].any()
    assert_close(grads | {"embed": of_embed}, want, SAME_MODEL)


@pytest.mark.parametrize("engine", [Exact(), Polynomial()], ids=["exact", "polynomial"])
def test_a_batch_is_the_mean_over_its_sequences(engine, backend, rng):
    model, tokens, targets = model_and_tokens(backend, rng, batch=(2, 3), engine=engine)
    loss, grads = model.value_and_grad(tokens, targets)
    single = [model.value_and_grad(tokens[at], targets[at]) for at in np.ndindex(2, 3)]
    assert relative_error(loss, np.mean([x[0] for x in single])) <= SAME_MODEL
    assert_close(grads, {name: np.mean([x[1][name] for x in single], axis=0) for name in grads}, SAME_MODEL)


@pytest.mark.parametrize(
    "engine",
    [Exact(), Polynomial(), Polynomial(coefficients="fitted")],
    ids=["exact", "polynomial", "fitted"],
)
def test_a_float32_model_is_close_to_its_float64_self(engine, backend, rng):
    config = dataclasses.replace(LARGE, engine=engine)
    params = lg.Transformer(config).params
    narrow, wide = (Model(backend, config, cast(params, dtype)) for dtype in (np.float32, np.float64))
    tokens, targets = rng.integers(0, 256, (2, 1500 if backend.is_rust else 600))
    (loss, grads), (want_loss, want) = (model.value_and_grad(tokens, targets) for model in (narrow, wide))
    assert relative_error(loss, want_loss) <= FLOAT32_LOSS
    assert all(x.dtype == np.float32 for x in grads.values())
    assert_close(grads, want, FLOAT32_MODEL)


def test_a_model_is_the_chain_of_its_modules(backend, rng):
    model, tokens, _ = model_and_tokens(backend, rng, causal=True, rope=True, engine=Polynomial())
    p, config = on_backend(backend, model.params), model.config
    modules = [lg.Embedding(embed=p["embed"])]
    for i in range(config.n_layers):
        at = f"layers.{i}"
        weights = {name: p[f"{at}.attn.{name}"] for name in ("w_q", "w_k", "w_v", "w_o")}
        heads = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads}
        attention = lg.SelfAttention(**weights, **heads, rope=True, causal=True, engine=config.engine)
        w_in, w_out = p[f"{at}.ffn.w_in"], p[f"{at}.ffn.w_out"]
        feed_forward = lg.FeedForward(w_in=w_in, w_out=w_out, activation="silu")
        modules.append(lg.Residual(lg.Chain([lg.RMSNorm(gain=p[f"{at}.attn_norm.gain"]), attention])))
        modules.append(lg.Residual(lg.Chain([lg.RMSNorm(gain=p[f"{at}.ffn_norm.gain"]), feed_forward])))
    modules += [lg.RMSNorm(gain=p["norm.gain"]), lg.Linear(w=p["head"])]
    y, pullback = lg.Chain(modules).vjp(backend.array(tokens))
    y_model, pullback_model = model.vjp(tokens)
    dy = rng.standard_normal(y.shape)
    grads, want = pullback(backend.array(dy))[1], pullback_model(dy)[1]
    got = {"embed": grads[0]["embed"], "norm.gain": grads[-2]["gain"], "head": grads[-1]["w"]}
    for i in range(config.n_layers):
        (attn_norm, attn), (ffn_norm, ffn) = grads[1 + 2 * i : 3 + 2 * i]
        got |= {f"layers.{i}.attn_norm.gain": attn_norm["gain"], f"layers.{i}.ffn_norm.gain": ffn_norm["gain"]}
        got |= {f"layers.{i}.attn.{name}": x for name, x in attn.items()}
        got |= {f"layers.{i}.ffn.{name}": x for name, x in ffn.items()}
    assert relative_error(y_model, backend.numpy(y)) <= SAME_MODEL
    assert_close(on_host(backend, got), want, SAME_MODEL)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64])
def test_tokens_may_be_integers_of_any_kind(kind, backend, rng):
    model, tokens, targets = model_and_tokens(backend, rng)
    loss, grads = model.value_and_grad(tokens.astype(kind), targets.astype(kind))
    want_loss, want = model.value_and_grad(tokens, targets)
    assert loss == want_loss
    assert_same_bits(grads, want)


@pytest.mark.parametrize("kind", [">u2", ">i4", ">i8"])
@pytest.mark.parametrize("backend", [RUST, GPU_NUMPY], indirect=True, ids=lambda backend: backend.name)
def test_tokens_may_be_in_another_byte_order(kind, backend, rng):
    model, tokens, targets = model_and_tokens(backend, rng)
    want_loss, want = model.value_and_grad(tokens, targets)
    loss, grads = model.value_and_grad(tokens.astype(kind), targets.astype(kind))
    assert loss == want_loss
    assert_same_bits(grads, want)
    assert np.array_equal(model.model.vjp(tokens.astype(kind))[0], model.model.vjp(tokens)[0])
    embedding = lg.Embedding(embed=np.eye(13))
    assert np.array_equal(embedding.vjp(tokens.astype(kind))[0], embedding.vjp(tokens)[0])


def test_parameters_may_change_between_calls(backend, rng):
    model, tokens, targets = model_and_tokens(backend, rng)
    before, grads = model.value_and_grad(tokens, targets)
    for name, x in model.params.items():
        model.model.params[name] = backend.array(x - 1e-3 * grads[name])
    assert model.value_and_grad(tokens, targets)[0] < before


def test_progress_rises_to_one(backend, rng):
    model, tokens, targets = model_and_tokens(backend, rng)
    seen = []
    model.value_and_grad(tokens, targets, progress=seen.append)
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    assert all(0 <= fraction <= 1 for fraction in seen)


@pytest.mark.parametrize("causal", [False, True])
def test_report_tells_each_layer_s_engine_error_and_gradient_norm(causal, backend, rng):
    model, tokens, targets = model_and_tokens(backend, rng, causal=causal, n=300, engine=Polynomial())
    report = model.gradient_report(tokens, targets, samples=300)
    loss, grads = model.value_and_grad(tokens, targets)
    assert report.loss == loss
    assert_same_bits(report.grads, grads)
    assert len(report.layers) == 2
    for i, layer in enumerate(report.layers):
        own = [np.sum(x**2) for name, x in grads.items() if name.startswith(f"layers.{i}.")]
        assert relative_error(layer.grad_norm, math.sqrt(sum(own))) <= SAME_MODEL
        assert layer.engine == Polynomial()
        assert 270 <= layer.measured_error.rows <= 300  # a row may be drawn twice
        assert 0 < layer.measured_error.low <= layer.measured_error.relative <= layer.measured_error.high < 1
    exact = Model(backend, dataclasses.replace(model.config, engine=Exact()), model.params)
    assert all(layer.measured_error.relative <= SAME_MODEL for layer in exact.gradient_report(tokens, targets).layers)
    assert all(layer.measured_error is None for layer in exact.gradient_report(tokens, targets, samples=0).layers)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_a_gradient_whose_squares_no_float_holds_has_a_norm(size, backend):
    arrays = [backend.array(size * np.array([[3.0, 0.0]])), backend.array(size * np.array([-4.0]))]
    assert relative_error(select.of(*arrays).frobenius_norm(arrays) / size, 5) <= SAME_MODEL
    assert select.of(*arrays).frobenius_norm([backend.array(np.zeros(3))]) == 0


def test_first_layer_s_measured_error_is_that_of_its_attention(backend, rng):
    model, tokens, targets = model_and_tokens(
        backend, rng, n=200, causal=False, rope=False, n_layers=1, engine=Polynomial()
    )
    p = model.params
    x, _ = run_vjp(backend, lg.RMSNorm(gain=backend.array(p["layers.0.attn_norm.gain"])), p["embed"][tokens])

    def split(name, heads):
        return (x @ p[f"layers.0.attn.{name}"]).reshape(200, heads, 4).swapaxes(0, 1)

    qkv = [backend.array(x) for x in (split("w_q", 4), split("w_k", 2), split("w_v", 2))]
    want = relative_error(*(backend.numpy(lg.attention(*qkv, engine=engine)) for engine in (Polynomial(), Exact())))
    (layer,) = model.gradient_report(tokens, targets, samples=800).layers
    assert relative_error(layer.measured_error.relative, want) <= SAME_MODEL


@pytest.mark.parametrize(
    "engine",
    [Exact(), Polynomial(), Polynomial(degree=3, coefficients=(1, 0.9, 0.5, 0.2), gradient="consistent", window=7)],
    ids=["exact", "polynomial", "given coefficients"],
)
def test_a_saved_model_is_loaded_as_it_was(engine, dtype, tmp_path, rng):
    options = {"norm": "layer", "score_bound": 2.5, "engine": engine}
    model, tokens, targets = model_and_tokens(RUST, rng, dtype=dtype, **options)
    model = model.model
    lg.save(tmp_path / "model.safetensors", model)
    loaded = lg.load(str(tmp_path / "model.safetensors"))
    assert isinstance(loaded, lg.Transformer)
    assert loaded.config == model.config
    assert_same_bits(loaded.params, model.params)
    assert loaded.value_and_grad(tokens, targets)[0] == model.value_and_grad(tokens, targets)[0]


def test_saved_arrays_are_loaded_as_they_were(dtype, tmp_path, rng):
    arrays = {"a": rng.standard_normal((3, 4)).astype(dtype).T, "b": np.zeros(0, dtype), "c": np.ones(5, dtype)[::-1]}
    lg.save(tmp_path / "arrays.safetensors", arrays)
    assert_same_bits(lg.load(tmp_path / "arrays.safetensors"), arrays)


def test_another_safetensors_library_reads_a_saved_file(tmp_path, rng):
    from safetensors.numpy import load_file

    model, *_ = model_and_tokens(RUST, rng)
    lg.save(tmp_path / "model.safetensors", model.model)
    assert_same_bits(load_file(tmp_path / "model.safetensors"), model.params)


def with_config(text):
    header = json.dumps({"__metadata__": {"lingrad_rs.config": text}}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [b"", b"not safetensors", with_config("{}"), with_config("[1]"), with_config('{"engine": {"kind": "Magic"}}')],
    ids=["empty", "not safetensors", "empty config", "config a list", "unknown engine"],
)
def test_a_file_that_is_not_a_model_is_an_argument_error(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(lg.ArgumentError, match="cannot be read"):
        lg.load(tmp_path / "file")


def test_a_missing_file_is_python_s_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        lg.load(tmp_path / "missing")


def test_the_version_is_that_of_the_installed_package():
    assert lg.__version__ == importlib.metadata.version("lingrad_rs")
