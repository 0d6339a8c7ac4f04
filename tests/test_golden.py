"""The golden results: float64 automatic differentiation, made independently of this project."""

import math
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close, cast, on_backend, on_host, relative_error, run_attention
from limits import GOLDEN

import lingrad_rs as lg

GOLDEN_FILES = Path(__file__).parent / "golden"


def read(name):
    with np.load(GOLDEN_FILES / f"{name}.npz") as file:
        return {key: file[key] if file[key].ndim else file[key].item() for key in file.files}


def below(record, prefix):
    """The entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in record.items() if name.startswith(prefix)}


def test_every_golden_file_is_tested():
    names = {path.stem for path in GOLDEN_FILES.glob("*.npz")}
    assert names == {*ATTENTION, *PAPER_LAYERS, "paper_chain", "paper_chain_residual", *TRANSFORMERS}


ATTENTION = ("attention_plain", "attention_key_bias", "attention_causal_gqa")


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_matches_golden(name, backend, dtype):
    golden = read(name)
    inputs = {key: golden[key] for key in ("q", "k", "v", "dout", "key_bias") if key in golden}
    got = run_attention(backend, cast(inputs, dtype), engine=lg.Exact(), causal=golden["causal"])
    got.pop("dkey_bias", None)  # the files do not hold it
    assert_close(got, {key: golden[key] for key in ("out", "dq", "dk", "dv")}, GOLDEN[dtype])


PAPER_LAYERS = ("paper_layer_full", "paper_layer_causal")


@pytest.mark.parametrize("name", PAPER_LAYERS)
def test_paper_layer_matches_golden(name, backend, dtype):
    golden = read(name)
    x, w, w_v, dout = (backend.array(golden[key].astype(dtype)) for key in ("x", "w", "w_v", "dout"))
    layer = lg.SelfAttention(w=w, w_v=w_v, engine=lg.Exact(), causal=golden["causal"], scale=golden["scale"])
    y, pullback = layer.vjp(x)
    dx, grads = pullback(dout)
    got = {"out": y, "dx": dx, "dw": grads["w"], "dw_v": grads["w_v"]}
    assert grads.keys() == {"w", "w_v"}
    assert_close(on_host(backend, got), {key: golden[key] for key in got}, GOLDEN[dtype])


def paper_chain(golden, dtype, backend):
    """The chain of the file, and the names of its gradients in the order in which they come back."""
    modules, residual = [], golden["residual"]
    for i in range(golden["n_layers"]):
        w, w_v, w_g = (backend.array(golden[f"param.{i}.{name}"].astype(dtype)) for name in ("w", "w_v", "w_g"))
        attention = lg.SelfAttention(w=w, w_v=w_v, engine=lg.Exact(), causal=golden["causal"], scale=golden["scale"])
        feed_forward = [lg.Linear(w=w_g), lg.Activation("relu")]
        if residual:
            modules += [lg.Residual(attention), lg.Residual(lg.Chain(feed_forward))]
        else:
            modules += [attention, *feed_forward]
    return lg.Chain(modules)


@pytest.mark.parametrize("residual", [False, True])
def test_paper_chain_matches_golden(residual, backend, dtype):
    golden = read("paper_chain_residual" if residual else "paper_chain") | {"residual": residual}
    x, dout = (backend.array(golden[key].astype(dtype)) for key in ("x", "dout"))
    y, pullback = paper_chain(golden, dtype, backend).vjp(x)
    dx, grads = pullback(dout)
    got = {"out": y, "dx": dx}
    size = 2 if residual else 3
    for i in range(golden["n_layers"]):
        attention, feed_forward = grads[size * i : size * i + 2]
        linear = feed_forward[0] if residual else feed_forward
        got |= {f"grad.{i}.w": attention["w"], f"grad.{i}.w_v": attention["w_v"], f"grad.{i}.w_g": linear["w"]}
    want = {key: golden[key] for key in golden if key in ("out", "dx") or key.startswith("grad.")}
    assert_close(on_host(backend, got), want, GOLDEN[dtype])


TRANSFORMERS = ("transformer", "transformer_bounded")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_matches_golden(name, backend, dtype):
    golden = read(name)
    config = below(golden, "config.")
    assert config.pop("n") == len(golden["tokens"])
    config = {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in config.items()}
    params = on_backend(backend, cast(below(golden, "param."), dtype))
    model = lg.Transformer(lg.TransformerConfig(**config, engine=lg.Exact()), params)
    loss, grads = model.value_and_grad(backend.array(golden["tokens"]), backend.array(golden["targets"]))
    assert relative_error(loss, golden["loss"]) <= GOLDEN[dtype]
    assert_close(on_host(backend, grads), below(golden, "grad."), GOLDEN[dtype])
