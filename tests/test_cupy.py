"""What the GPU path asks of CuPy's namespace is there, without a GPU: functions, and the arguments that they take."""

import inspect

import array_api_compat.numpy as of_numpy
import numpy as np
import pytest
from conftest import GPU_NUMPY
from helpers import cast, draw, random_params, run_attention, small_config

import lingrad_rs as lg
from lingrad_rs.backends import select
from lingrad_rs.backends.array import device

ENGINES = [
    lg.Exact(),
    lg.Polynomial(coefficients="fitted"),
    lg.Polynomial(gradient="consistent", diagonal="polynomial"),
    lg.Landmark(rank=8),
    lg.Auto(1e-1),
]
WITHOUT_SIGNATURE = {"dtype", "out", "casting"}


class Recorder:
    """NumPy's namespace, which notes how its functions are called."""

    def __init__(self):
        self.calls = {}

    def __getattr__(self, name):
        found = getattr(of_numpy, name)
        if isinstance(found, type | float) or not callable(found):
            return found

        def noted(*args, **kwargs):
            self.calls.setdefault((name, len(args), frozenset(kwargs)), None)
            return found(*args, **kwargs)

        return noted


@pytest.fixture
def calls(monkeypatch, rng):
    """Those of all that the path computes."""
    recorder = Recorder()
    monkeypatch.setattr(device.array_api_compat, "array_namespace", lambda x: recorder)
    monkeypatch.setattr(select, "KINDS", [*GPU_NUMPY.kinds, *select.KINDS])
    inputs = cast(draw(rng, n=1300, heads=(2, 2), key_heads=(2, 1), bias=True, size=0.3), np.float32)
    for engine in ENGINES:
        for causal in (False, True):
            if causal or getattr(engine, "diagonal", None) != "polynomial":
                run_attention(GPU_NUMPY, inputs, engine=engine, causal=causal)
    run_attention(GPU_NUMPY, inputs, engine=lg.Polynomial(shift="mean", gradient="consistent"))
    del inputs["dout"]
    out, vjp = lg.attention_vjp(**inputs, engine=lg.Polynomial())
    vjp(out, samples=20)
    lg.measure_error(**inputs, out=out)
    lg.plan_attention(**inputs, tol=1e-1)
    tokens = rng.integers(0, 13, (2, 2, 30))
    for options in ({"norm": "layer", "activation": "gelu_tanh"}, {"rope": True, "score_bound": 1.0}):
        config = small_config(engine=lg.Polynomial(), **options)
        lg.Transformer(config, random_params(config, rng)).value_and_grad(*tokens)
    return list(recorder.calls)


def test_cupy_has_what_is_asked_of_it(calls):
    pytest.importorskip("cupy", reason="CuPy is not installed")
    import array_api_compat.cupy as namespace
    import cupy

    assert len(calls) > 30
    missing = []
    for name, count, names in calls:
        function = getattr(namespace, name, None)
        if function is None:
            missing.append(f"{name} is missing")
        elif isinstance(function, cupy.ufunc):
            if count != function.nin or not names <= WITHOUT_SIGNATURE:
                missing.append(f"{name} takes {function.nin} arrays; given are {count}, {sorted(names)}")
        else:
            signature = inspect.signature(function)
            own = signature.parameters
            passed_on = [x for x in names if x not in own]
            try:
                signature.bind(*range(count), **dict.fromkeys(names))
                if passed_on and any(x.kind is x.VAR_KEYWORD for x in own.values()):
                    behind = getattr(cupy, name)
                    assert (
                        isinstance(behind, cupy.ufunc) or set(passed_on) <= inspect.signature(behind).parameters.keys()
                    )
            except (TypeError, AssertionError):
                missing.append(f"{name}{signature} is given {count} arguments, {sorted(names)}")
    assert not missing, "\n".join(missing)
