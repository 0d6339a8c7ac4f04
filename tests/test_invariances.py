"""What attention does not depend on."""

import numpy as np
import pytest
from helpers import assert_close, cast, draw, random_params, run_attention, small_config
from limits import CONSTANT_VALUES, REORDERED, SHIFTED_KEYS

import lingrad_rs as lg
from lingrad_rs import Exact, Polynomial

ENGINES = {
    "exact": Exact(),
    "polynomial": Polynomial(),
    "polynomial, consistent": Polynomial(gradient="consistent"),
    "degree 4": Polynomial(degree=4),
    "given coefficients": Polynomial(coefficients=(1.1, 0.9, 0.6)),
}
CAUSAL = ENGINES | {
    "fitted": Polynomial(coefficients="fitted"),
    "fitted, no window": Polynomial(coefficients="fitted", window=0),
    "fitted, wide window": Polynomial(coefficients="fitted", window=1200),
    "polynomial diagonal": Polynomial(diagonal="polynomial"),
    "polynomial diagonal, consistent": Polynomial(diagonal="polynomial", gradient="consistent"),
    "no window": Polynomial(window=0),
}
SHIFTED = {
    "exact": Exact(),
    "shift, closed form": Polynomial(shift="mean"),
    "shift, consistent": Polynomial(shift="mean", gradient="consistent"),
}
# Longer than the tokens at the start, 1024 of them, that coefficients are fitted to under a causal mask.
N = 1500


def engines(table):
    return pytest.mark.parametrize("engine", table.values(), ids=table.keys())


@engines(ENGINES | SHIFTED)
def test_the_order_of_keys_does_not_matter(engine, backend, dtype, rng):
    inputs = cast(draw(rng, n=100, m=150, bias=True), dtype)
    order = rng.permutation(150)
    permuted = {name: x[order] if name in ("k", "v", "key_bias") else x for name, x in inputs.items()}
    got, want = run_attention(backend, permuted, engine=engine), run_attention(backend, inputs, engine=engine)
    for name in ("dk", "dv", "dkey_bias"):
        want[name] = want[name][order]
    assert_close(got, want, REORDERED[dtype])


@engines(SHIFTED)
def test_a_vector_added_to_all_keys_changes_nothing(engine, backend, dtype, rng):
    inputs = cast(draw(rng, n=100, m=150), dtype)
    moved = inputs | {"k": inputs["k"] + rng.standard_normal(5).astype(dtype)}
    got, want = run_attention(backend, moved, engine=engine), run_attention(backend, inputs, engine=engine)
    assert_close(got, want, SHIFTED_KEYS[dtype])


@pytest.mark.parametrize("causal", [False, True])
@engines(ENGINES)
def test_equal_values_come_out_as_they_are(engine, causal, backend, dtype, rng):
    inputs = cast(draw(rng, n=200), dtype)
    inputs["v"][:] = inputs["v"][0]
    got = run_attention(backend, inputs, engine=engine, causal=causal)
    assert np.abs(got["out"] - inputs["v"][0]).max() <= CONSTANT_VALUES[dtype]
    assert np.abs(got["dq"]).max() <= CONSTANT_VALUES[dtype]
    assert np.abs(got["dk"]).max() <= CONSTANT_VALUES[dtype]


@pytest.mark.parametrize("t", [64, 1100, N - 1])
@engines(CAUSAL)
def test_later_tokens_do_not_change_earlier_outputs(engine, t, backend, dtype, rng):
    inputs = cast(draw(rng, n=N, heads=(2,)), dtype)
    changed = {name: x.copy() for name, x in inputs.items()}
    for name in "qkv":
        changed[name][:, t:] = rng.standard_normal(inputs[name][:, t:].shape)
    before, after = (run_attention(backend, x, engine=engine, causal=True)["out"] for x in (inputs, changed))
    assert np.array_equal(before[:, :t], after[:, :t])
    assert not np.array_equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("t", [200, 1100])
@engines(CAUSAL)
def test_later_biases_do_not_change_earlier_outputs(engine, t, backend, dtype, rng):
    inputs = cast(draw(rng, n=N, heads=(2,), bias=True), dtype)
    changed = inputs | {"key_bias": inputs["key_bias"].copy()}
    changed["key_bias"][:, t:] = 3 * rng.standard_normal((2, N - t))
    before, after = (run_attention(backend, x, engine=engine, causal=True)["out"] for x in (inputs, changed))
    assert not np.array_equal(before[:, t:], after[:, t:])
    assert np.array_equal(after[:, :t], before[:, :t])


@pytest.mark.parametrize("bias", [20, 50, 60, 80, 87, 400, 700, 1000])
@engines({name: CAUSAL[name] for name in ("exact", "polynomial", "fitted", "polynomial diagonal", "no window")})
def test_a_large_later_bias_changes_no_earlier_output(engine, bias, backend, dtype, rng):
    inputs = cast(draw(rng, n=N), dtype) | {"key_bias": np.zeros(N, dtype)}
    changed = inputs | {"key_bias": np.append(np.zeros(N - 1), bias).astype(dtype)}
    before, after = (run_attention(backend, x, engine=engine, causal=True)["out"][:-1] for x in (inputs, changed))
    assert np.array_equal(after, before)


@pytest.mark.parametrize("t", [64, 1100, N - 1])
@engines(CAUSAL)
def test_earlier_outputs_have_no_gradient_in_later_tokens(engine, t, backend, dtype, rng):
    inputs = cast(draw(rng, n=N, heads=(2,)), dtype)
    inputs["key_bias"] = np.zeros((2, N), dtype)
    inputs["dout"][:, t:] = 0
    got = run_attention(backend, inputs, engine=engine, causal=True)
    for name in ("dq", "dk", "dv", "dkey_bias"):
        assert not got[name][:, t:].any()
        assert got[name][:, :t].any() or t == 1  # the first token sees itself alone: its softmax is constant
    assert got["dv"][:, :t].any()


@engines(CAUSAL)
def test_later_tokens_do_not_change_earlier_logits_of_a_model(engine, backend, dtype, rng):
    config = small_config(engine=engine)
    params = random_params(config, rng, dtype)
    model = lg.Transformer(config, {name: backend.array(x / 2) for name, x in params.items()})
    tokens = rng.integers(0, config.vocab_size, N)
    changed = tokens.copy()
    changed[1200:] = (changed[1200:] + 1) % config.vocab_size
    before, after = (backend.numpy(model.vjp(backend.array(x))[0]) for x in (tokens, changed))
    assert np.array_equal(before[:1200], after[:1200])
    assert not np.array_equal(before[1200:], after[1200:])


@pytest.mark.parametrize("causal", [False, True])
@engines(ENGINES)
def test_grouped_heads_are_repeated_keys(engine, causal, backend, dtype, rng):
    inputs = cast(draw(rng, n=150, heads=(2, 6), key_heads=(2, 2), bias=True), dtype)
    repeated = {name: np.repeat(x, 3, axis=1) if name in ("k", "v", "key_bias") else x for name, x in inputs.items()}
    got = run_attention(backend, inputs, engine=engine, causal=causal)
    want = run_attention(backend, repeated, engine=engine, causal=causal)
    for name in ("dk", "dv", "dkey_bias"):
        x = want[name].astype(np.float64)
        want[name] = x.reshape(2, 2, 3, *x.shape[2:]).sum(axis=2)
    assert_close(got, want, REORDERED[dtype])


@engines(ENGINES)
def test_removed_keys_are_as_if_they_were_not_there(engine, backend, dtype, rng):
    inputs = cast(draw(rng, n=60, m=100, bias=True), dtype)
    there = np.isfinite(inputs["key_bias"])
    without = {name: x[there] if name in ("k", "v", "key_bias") else x for name, x in inputs.items()}
    got, want = run_attention(backend, inputs, engine=engine), run_attention(backend, without, engine=engine)
    for name in ("dk", "dv", "dkey_bias"):
        assert not got[name][~there].any()
        got[name] = got[name][there]
    assert_close(got, want, REORDERED[dtype])
