"""Engines, plans and reports are values: compared, hashed, copied and written without a change, or refused."""

import copy
import dataclasses
import json
import math
import pickle
import re

import numpy as np
import pytest
from conftest import GPU_NUMPY, RUST
from helpers import random_params, small_config

import lingrad_rs as lg
from lingrad_rs import Auto, Exact, Landmark, Polynomial
from lingrad_rs.spec.plan import unplanned

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "replace": dataclasses.replace,
}
ON_BOTH_PATHS = pytest.mark.parametrize(
    "backend", [RUST, GPU_NUMPY], indirect=True, ids=lambda backend: backend.name.replace(" ", "-")
)


def constants(landmark=0.25):
    return lg.LandmarkConstants(1.0, np.zeros(4), np.ones(4), 2.0, np.full((3, 4), landmark), np.eye(3))


def plan_of(*heads):
    return lg.Plan(
        auto=Auto(0.1),
        heads=heads,
        causal=np.bool_(True),
        scale=np.float32(0.5),
        shapes=[[len(heads), 8, 4]] * 3,
        dtype="float64",
    )


def measured(head, *estimate):
    error = lg.ErrorEstimate(*estimate, rows=16)
    return dataclasses.replace(head, measured_error=error, errors={"out": error})


PLAN = plan_of(
    measured(unplanned(Landmark(constants=constants())), 0.01, 0.005, 0.02),
    measured(unplanned(Polynomial(coefficients=np.ones(3), shift=(np.ones(4), [0] * 4))), math.inf, 0.0, math.inf),
    lg.HeadPlan(Exact(), 0.25, None, 0.5, 1e-3, 1.5, ("landmarks",), "the cheapest", "too large"),
)


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
def test_the_constants_of_a_copy_are_equal_and_read_only(how):
    engine = how(Landmark(constants=constants()))
    assert engine == Landmark(constants=constants())
    for made in (engine.constants, how(constants())):
        assert made == constants()
        for name in ("query_shift", "key_shift", "landmarks", "matrix"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(made, name)[...] = 7


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
def test_a_plan_equals_its_copy_and_both_are_one_key_of_a_dict(how):
    again = how(PLAN)
    assert again == PLAN
    assert {PLAN: "found"}[again] == "found"
    assert len({*PLAN.heads, *again.heads}) == 3


def test_plans_that_differ_are_told_apart():
    other = lg.ErrorEstimate(0.5, 0.25, 1.0, 16)
    for i, head in enumerate(PLAN.heads):
        for changes in (
            {"reason": "another"},
            {"cost": 0.125},
            {"errors": {**head.errors, "dq": other}},
            {"engine": Landmark(constants=constants(0.5))},
        ):
            changed = dataclasses.replace(head, **changes)
            assert changed != head
            assert plan_of(*PLAN.heads[:i], changed, *PLAN.heads[i + 1 :]) != PLAN
    assert PLAN != "plan"
    assert PLAN.heads[0] != "head"


def test_constants_that_are_equal_have_one_hash():
    assert constants(0.0) == constants(-0.0)
    assert hash(constants(0.0)) == hash(constants(-0.0))
    assert constants(0.5) != constants()


def test_a_plan_is_json_whatever_its_numbers_and_comes_back_as_it_was():
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = PLAN.to_json()
    json.loads(text, parse_constant=refuse)
    again = lg.Plan.from_json(text)
    assert again == PLAN
    assert again.to_json() == text
    assert math.isnan(again.heads[0].cost)
    assert again.heads[1].measured_error.high == math.inf


def test_a_made_plan_of_any_heads_is_json(backend, rng):
    for x in (np.zeros((2, 0, 4)), rng.standard_normal((2, 3000, 4)) / 4):
        plan = lg.plan_attention(*[backend.array(x)] * 3, tol=0.1)
        assert "NaN" not in plan.to_json()
        assert "Infinity" not in plan.to_json()
        assert lg.Plan.from_json(plan.to_json()) == plan
        assert plan.dtype == "float64"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_does_not_have_is_not_written(value):
    head = lg.HeadPlan(Exact(), value, None, None, 1.0, 1.0)
    with pytest.raises(lg.ArgumentError, match="a number that JSON does not have"):
        plan_of(head).to_json()


def changed_json(*keys, value):
    """The plan's JSON with another value somewhere."""
    plan = json.loads(PLAN.to_json())
    at = plan
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return json.dumps(plan)


BAD_JSON = {
    "NaN": PLAN.to_json().replace("0.25", "NaN", 1),
    "nested deeply": "[" * 100_000,
    "no text": None,
    "digits without end": changed_json("scale", value=0.5).replace("0.5", "1" * 400, 1),
    "a tolerance of 2": changed_json("auto", "tol", value=2),
    "a scale that is text": changed_json("scale", value="1"),
    "an unknown dtype": changed_json("dtype", value="float16"),
    "an axis that is text": changed_json("shapes", 0, 1, value="8"),
    "a negative axis": changed_json("shapes", 2, 1, value=-8),
    "heads for another shape": changed_json("heads", value=[]),
    "heads that are numbers": changed_json("heads", value=[1, 2, 3]),
    "a cost that is text": changed_json("heads", 0, "cost", value="1"),
    "a bound that is text": changed_json("heads", 0, "error_bound", value="1"),
    "a reason that is a number": changed_json("heads", 0, "reason", value=3),
    "a reason of half a character": changed_json("heads", 0, "reason", value="\ud800"),
    "a name of half a character": changed_json("heads", 0, "whole_sequence", value=["\ud800"]),
    "names that are text": changed_json("heads", 0, "whole_sequence", value="landmarks"),
    "names that are numbers": changed_json("heads", 0, "whole_sequence", value=[3]),
    "errors that are text": changed_json("heads", 0, "errors", value=[["out", ["a", "b", "c", 3]]]),
    "rows that are half": changed_json("heads", 0, "errors", value=[["out", [1, 1, 1, 0.5]]]),
    "an engine of no kind": changed_json("heads", 0, "engine", "kind", value="Magic"),
    "a tolerance as an engine": changed_json("heads", 0, "engine", value={"kind": "Auto"}),
    "landmarks that are text": changed_json("heads", 0, "engine", "constants", "landmarks", value="x"),
    "landmarks in rags": changed_json("heads", 0, "engine", "constants", "landmarks", value=[[1, 2], [3]]),
    "landmarks without end": changed_json("heads", 0, "engine", "constants", "landmarks", value=[[10**400] * 4] * 3),
    "constants that are a list": changed_json("heads", 0, "engine", "constants", value=[1]),
    "an unknown field": changed_json("magic", value=1),
}


BAD_FIELDS = {
    "an estimate that is a number": ("measured_error", 0.1),
    "errors that are a list": ("errors", [("out", 0.1)]),
    "errors that are numbers": ("errors", {"out": 0.1}),
    "errors by numbers": ("errors", {1: lg.ErrorEstimate(0.1, 0.0, 0.2, 3)}),
    "names that are no tuple": ("whole_sequence", 3),
    "a reason of half a character": ("reason", "\ud800"),
    "a cost of too many digits": ("cost", 10**5000),
}


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_a_wrong_field_of_a_head_s_plan_is_an_argument_error(name, value):
    with pytest.raises(lg.ArgumentError, match=rf"{name}\b"):
        dataclasses.replace(unplanned(Exact()), **{name: value})


BAD_PLANS = {
    "shapes that are a number": ("shapes", 3),
    "shapes that are bytes": ("shapes", b"abc"),
    "two shapes": ("shapes", ((8, 4), (8, 4))),
    "a shape that is a number": ("shapes", ((8, 4), (8, 4), 8)),
    "axes without end": ("shapes", ([2**62] * 300, (8, 4), (8, 4))),
    "heads that are a number": ("heads", 3),
    "a head that is a number": ("heads", [3]),
}


@pytest.mark.parametrize(("name", "value"), BAD_PLANS.values(), ids=BAD_PLANS.keys())
def test_a_wrong_field_of_a_plan_is_an_argument_error(name, value):
    with pytest.raises(lg.ArgumentError, match=r"shapes|heads"):
        dataclasses.replace(PLAN, **{name: value})


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_json_that_holds_no_sound_plan_is_an_argument_error(text):
    with pytest.raises(lg.ArgumentError, match="holds no plan"):
        lg.Plan.from_json(text)


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
def test_a_report_of_gradients_equals_its_copy_and_no_other(how, backend, rng):
    config = small_config(n_layers=1, engine=Polynomial())
    params = {name: backend.array(x) for name, x in random_params(config, rng).items()}
    tokens = [backend.array(rng.integers(0, config.vocab_size, 40)) for _ in range(2)]
    report = lg.Transformer(config, params).gradient_report(*tokens)
    again = how(report)
    assert again == report
    grads = report.grads | {"head": backend.array(2 * backend.numpy(report.grads["head"]))}
    for changed in (
        dataclasses.replace(report, grads=grads),
        dataclasses.replace(report, grads={"head": report.grads["head"]}),
        dataclasses.replace(report, grads=report.grads | {"head": report.grads["embed"]}),
        dataclasses.replace(report, loss=0.0),
        dataclasses.replace(report, layers=()),
        report.loss,
    ):
        assert changed != report
    with pytest.raises(TypeError, match="unhashable"):
        hash(report)


def derived(engine):
    """The same engine, of a class of one's own."""
    mine = type("Mine", (type(engine),), {})
    return mine(**{field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)})


X = np.ones((8, 4))
USES = {
    "attention": lambda engine: lg.attention(X, X, X, engine=engine),
    "attention_vjp": lambda engine: lg.attention_vjp(X, X, X, engine=engine),
    "a layer": lambda engine: lg.SelfAttention(w=X[:4], w_v=X[:4], engine=engine),
    "a model": lambda engine: small_config(engine=engine),
    "a plan": lambda engine: plan_of(unplanned(engine)),
}


@ON_BOTH_PATHS
@pytest.mark.parametrize(
    "engine", [Exact(), Polynomial(), Landmark(), Auto()], ids=lambda engine: type(engine).__name__
)
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_an_engine_of_a_derived_class_is_refused_by_name(use, engine, backend):
    message = f"engine is a test_values.Mine, a class derived from {type(engine).__name__}; expected"
    if use is USES["a plan"] and isinstance(engine, Auto):
        message = "engine is Mine(tol=0.01, "
    with pytest.raises(lg.ArgumentError, match=re.escape(message)):
        use(derived(engine))


@ON_BOTH_PATHS
def test_a_plan_of_a_derived_class_is_refused_by_name(backend):
    plan = derived(lg.plan_attention(X, X, X, tol=0.1))
    for use in (plan.attention, plan.attention_vjp):
        with pytest.raises(lg.ArgumentError, match=re.escape("plan is a test_values.Mine, a class derived from Plan")):
            use(X, X, X)


@ON_BOTH_PATHS
def test_constants_of_a_derived_class_are_computed_with(backend, rng):
    q = 0.3 * rng.standard_normal((200, 4))
    given = dataclasses.replace(constants(), scale=0.5, landmarks=q[:3])
    want = lg.attention(q, q, q, engine=Landmark(constants=given))
    assert np.array_equal(lg.attention(q, q, q, engine=Landmark(constants=derived(given))), want)


@pytest.mark.parametrize("name", ["scale", "eps"])
def test_an_integer_beyond_all_floats_is_an_argument_error(name):
    with pytest.raises(lg.ArgumentError, match=f"{name} is larger in size than any float"):
        lg.attention(X, X, X, scale=10**400) if name == "scale" else lg.RMSNorm(gain=X[0], eps=10**400)


def test_json_of_earlier_plans_is_read():
    """Their errors were lists of names and numbers."""
    error = lg.ErrorEstimate(1e-3, 5e-4, np.inf, 64)
    head = dataclasses.replace(unplanned(lg.Exact()), errors={"out": error}, measured_error=error)
    plan = lg.Plan(lg.Auto(1e-2), (head,), causal=False, scale=0.5, shapes=((4, 2),) * 3, dtype="float64")
    text = json.loads(plan.to_json())
    text["heads"][0]["errors"] = [["out", [1e-3, 5e-4, None, 64]]]
    assert lg.Plan.from_json(json.dumps(text)) == plan
