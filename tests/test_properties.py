"""The engines against the oracle over shapes and options drawn by hypothesis."""

import numpy as np
from helpers import assert_close, cast, draw, oracle_attention, run_attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import ORACLE

import lingrad_rs as lg

DTYPES = st.sampled_from([np.dtype(np.float32), np.dtype(np.float64)])
# The fixture chooses what computes, for all examples of a test.
ONE_BACKEND = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS = st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257]))


@st.composite
def engines(draw_one, causal):
    if draw_one(st.booleans()):
        return lg.Exact()
    degree = draw_one(st.integers(1, 4))
    taylor = draw_one(st.booleans())
    return lg.Polynomial(
        degree=degree,
        # Positive coefficients, a_0 large enough for the small scores drawn below.
        coefficients="taylor" if taylor else tuple([1.5] + [0.5 / j for j in range(1, degree + 1)]),
        gradient=draw_one(st.sampled_from(["closed_form", "consistent"])),
        shift="none" if causal else draw_one(st.sampled_from(["none", "mean"])),
        diagonal="polynomial",
    )


@st.composite
def calls(draw_one):
    """Inputs in float64, and the options of a call."""
    causal = draw_one(st.booleans())
    n = draw_one(LENGTHS)
    key_heads = draw_one(st.sampled_from([(), (1,), (2,), (2, 1), (1, 3)]))
    group = draw_one(st.integers(1, 3))
    inputs = draw(
        np.random.default_rng(draw_one(st.integers(0, 2**32))),
        n=n,
        m=n if causal else draw_one(LENGTHS),
        d=draw_one(st.integers(1, 9)),
        dv=draw_one(st.integers(1, 9)),
        heads=(*key_heads[:-1], group * key_heads[-1]) if key_heads else (),
        key_heads=key_heads,
        bias=draw_one(st.booleans()),
        size=0.4,
    )
    options = {
        "engine": draw_one(engines(causal)),
        "causal": causal,
        "scale": draw_one(st.sampled_from([None, 0.0, 0.25, -0.2])),
    }
    return inputs, options


@settings(ONE_BACKEND, max_examples=200)
@given(call=calls(), dtype=DTYPES)
def test_any_call_matches_the_oracle(backend, call, dtype):
    inputs, options = call
    inputs = cast(inputs, dtype)
    got = run_attention(backend, inputs, **options)
    assert_close(got, oracle_attention(inputs, **options), ORACLE[dtype])


@ONE_BACKEND
@given(call=calls(), dtype=DTYPES, seed=st.integers(0, 2**32))
def test_any_layout_matches_the_oracle(backend, call, dtype, seed):
    inputs, options = call
    inputs = cast(inputs, dtype)
    rng = np.random.default_rng(seed)

    def laid_out(x):
        order = rng.permutation(x.ndim)
        steps = tuple(slice(None, None, int(step)) for step in rng.choice([-1, 1], x.ndim))
        return np.ascontiguousarray(x.transpose(order)[steps])[steps].transpose(np.argsort(order))

    got = run_attention(backend, {name: laid_out(x) for name, x in inputs.items()}, **options)
    assert_close(got, oracle_attention(inputs, **options), ORACLE[dtype])


@ONE_BACKEND
@given(call=calls(), dtype=DTYPES)
def test_gradients_are_linear_in_dout(backend, call, dtype):
    inputs, options = call
    inputs = cast(inputs, dtype)
    once, twice = (run_attention(backend, inputs | {"dout": c * inputs["dout"]}, **options) for c in (1, 2))
    for name in once.keys() - {"out"}:
        assert np.array_equal(2 * once[name], twice[name])  # a power of 2 rounds nothing
