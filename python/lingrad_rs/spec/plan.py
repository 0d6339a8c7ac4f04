"""What was chosen for each head within a tolerance, and how well it did."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, get_args

from .. import _check
from ..errors import ArgumentError
from .engines import Auto, HeadEngine, described, engine_name, engine_of, not_derived

__all__ = ["ErrorEstimate", "HeadPlan", "PlanData", "head_plans", "head_report", "unplanned"]

_P = TypeVar("_P", bound="PlanData")

# The fields of a head that are NaN where its engine was given.
_COSTS = ("cost", "exact_cost")


@dataclass(frozen=True)
class ErrorEstimate:
    """An estimate of a relative error ``||got - exact||_F / ||exact||_F`` from sampled rows.

    Attributes
    ----------
    relative : float
        The estimate.
    low, high : float
        The ends of its 95% confidence interval.
    rows : int
        How many rows were computed exactly.

    Raises
    ------
    ArgumentError
        A field is no number, or ``rows`` is no integer of at least 0.
    """

    relative: float
    low: float
    high: float
    rows: int

    def __post_init__(self) -> None:
        for name in ("relative", "low", "high"):
            object.__setattr__(self, name, _check.real(name, getattr(self, name)))
        object.__setattr__(self, "rows", _check.integer("rows", self.rows, 0))


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """What computes a head, what was expected of it, and what was measured.

    Attributes
    ----------
    engine : Exact, Polynomial or Landmark
        With its constants, but for those that strictly causal calls take from their own first tokens.
    predicted_error : float or None
        The largest relative error that was expected of out, and of dq where gradients are planned for.
    measured_error : ErrorEstimate or None
        The error of out; None for the exact engine.
    errors : dict of str to ErrorEstimate
        The same, and those of "dq", "dk", "dv" and "dkey_bias" once gradients have been computed; those of keys are of
        all query heads that share them.
    error_bound : float or None
        The a-priori bound of the relative error of out, before rounding, for a polynomial up to degree 64 whose scores
        the norms keep small enough.
    cost, exact_cost : float
        The expected time of the engine and of exact attention, in seconds of one thread, or of the GPU; for forward and
        backward where gradients are planned for. NaN where the engine was given.
    whole_sequence : tuple of str
        With ``causal=True``, the constants of the engine that were taken from the whole sequence.
    reason : str
        Why this engine.
    missed : str or None
        What was tried and why it was not good enough, so that the head was computed exactly; or its gradients alone,
        while ``engine`` and the error of out are those of the forward pass.

    Raises
    ------
    ArgumentError
        A field has a value that it may not have.
    """

    engine: HeadEngine
    predicted_error: float | None
    measured_error: ErrorEstimate | None
    error_bound: float | None
    cost: float
    exact_cost: float
    whole_sequence: tuple[str, ...] = ()
    reason: str = ""
    missed: str | None = None
    errors: Mapping[str, ErrorEstimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.measured_error, ErrorEstimate | None):
            raise ArgumentError(
                f"measured_error is {_check.shown(self.measured_error)}; expected an ErrorEstimate or None"
            )
        if not isinstance(self.errors, Mapping):
            raise ArgumentError(f"errors is {_check.shown(self.errors)}; expected a dict of ErrorEstimate")
        object.__setattr__(self, "errors", dict(self.errors))
        for name, error in self.errors.items():
            if not _check.is_text(name) or not isinstance(error, ErrorEstimate):
                raise ArgumentError(
                    f"errors holds {_check.shown(name)}: {_check.shown(error)}; expected an ErrorEstimate by a name"
                )
        if not isinstance(self.engine, HeadEngine):
            raise ArgumentError(
                f"engine is {_check.shown(self.engine)}; expected Exact(), Polynomial(...) or Landmark(...)"
            )
        not_derived("engine", self.engine, get_args(HeadEngine))
        for name in ("predicted_error", "error_bound", *_COSTS):
            value = getattr(self, name)
            if value is not None or name in _COSTS:
                object.__setattr__(self, name, _check.real(name, value))
        object.__setattr__(self, "whole_sequence", _listed("whole_sequence", self.whole_sequence))
        for text in (self.reason, "" if self.missed is None else self.missed, *self.whole_sequence):
            if not _check.is_text(text):
                raise ArgumentError(
                    f"reason, missed or whole_sequence holds {_check.shown(text)}; expected text that UTF-8 can hold"
                )

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, HeadPlan) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(value for name, value in self._values().items() if name != "errors"))

    def _values(self) -> dict[str, Any]:
        """The fields, with None for the costs that are NaN: a plan equals its copy."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(HeadPlan)}
        return values | {name: None for name in _COSTS if math.isnan(values[name])}

    @property
    def engine_name(self) -> str:
        """The engine in a few words."""
        return engine_name(self.engine)


def _listed(name: str, value: object) -> tuple[Any, ...]:
    """The parts of a list or a tuple."""
    if not isinstance(value, list | tuple):
        raise ArgumentError(f"{name} is {_check.shown(value)}; expected a tuple")
    return tuple(value)


def head_plans(reports: Iterable[Mapping[str, Any]]) -> tuple[HeadPlan, ...]:
    """Head plans from what the core reports."""
    return tuple(_head_plan(dict(report)) for report in reports)


def unplanned(engine: HeadEngine) -> HeadPlan:
    """What is known of an engine that no plan chose."""
    return HeadPlan(engine, None, None, None, math.nan, math.nan, reason="given")


def _head_plan(report: dict[str, Any]) -> HeadPlan:
    errors = {name: ErrorEstimate(**estimate) for name, estimate in report.pop("errors").items()}
    return HeadPlan(
        engine=engine_of(report.pop("engine")),
        measured_error=errors.get("out"),
        errors=errors,
        **report,
    )


@dataclass(frozen=True)
class PlanData:
    """What a plan holds; `lingrad_rs.Plan` is one that computes, and tells of the fields."""

    auto: Auto
    heads: tuple[HeadPlan, ...]
    causal: bool
    scale: float
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    dtype: str

    def __post_init__(self) -> None:
        if not isinstance(self.auto, Auto):
            raise ArgumentError(f"auto is {_check.shown(self.auto)}; expected Auto(...)")
        object.__setattr__(self, "causal", _check.flag("causal", self.causal))
        object.__setattr__(self, "scale", _check.number("scale", self.scale))
        _check.choice("dtype", self.dtype, ("float32", "float64"))
        shapes = tuple(_listed("a shape in shapes", shape) for shape in _listed("shapes", self.shapes))
        if len(shapes) != 3:
            raise ArgumentError(f"shapes holds {len(shapes)} shapes; expected those of q, k and v")
        q, k, v = (tuple(_check.integer("an axis in shapes", x, 0) for x in shape) for shape in shapes)
        object.__setattr__(self, "shapes", (q, k, v))
        object.__setattr__(self, "heads", _listed("heads", self.heads))
        for i, head in enumerate(self.heads):
            if not isinstance(head, HeadPlan):
                raise ArgumentError(f"heads[{i}] is {_check.shown(head)}; expected a HeadPlan")
        expected = math.prod(q[:-2])
        if len(self.heads) != expected:
            raise ArgumentError(
                f"heads has {len(self.heads)} entries; expected {_check.shown(expected)} for q of shape {q}"
            )

    def __str__(self) -> str:
        what = "out and gradients" if self.auto.gradients else "out"
        mask = "causal" if self.causal else "full"
        q, k, _ = self.shapes
        title = f"plan within {self.auto.tol:g} for {what}, {mask}, {self.dtype}, q {q}, k {k}"
        return "\n".join([title, *table(self.heads)])

    def to_json(self) -> str:
        """The plan as JSON, with every number to the last bit.

        An estimated error that is infinite, and a cost that is NaN, are null there.

        Raises
        ------
        ArgumentError
            Another number is NaN or infinite, which JSON does not have.
        """
        plan = {
            "lingrad_rs": "plan",
            "auto": dataclasses.asdict(self.auto),
            "heads": [_to_json(head_report(head)) for head in self.heads],
            "causal": self.causal,
            "scale": self.scale,
            "shapes": self.shapes,
            "dtype": self.dtype,
        }
        try:
            return json.dumps(plan, allow_nan=False)
        except ValueError as error:
            raise ArgumentError(f"the plan holds a number that JSON does not have: {error}") from error

    @classmethod
    def from_json(cls: type[_P], text: str) -> _P:
        """The plan that `to_json` wrote.

        Raises
        ------
        ArgumentError
            The text holds no plan.
        """
        try:
            plan = json.loads(text, parse_constant=_refuse_constant)
            if plan.pop("lingrad_rs") != "plan":
                raise ValueError("another kind")
            q, k, v = (tuple(shape) for shape in plan.pop("shapes"))
            auto, heads = Auto(**plan.pop("auto")), head_plans(map(_from_json, plan.pop("heads")))
            return cls(auto=auto, heads=heads, shapes=(q, k, v), **plan)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ArgumentError(f"the text holds no plan of lingrad_rs: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _to_json(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of a head with null in place of costs that are NaN and of errors that are infinite."""
    costs = {name: None if math.isnan(report[name]) else report[name] for name in _COSTS}
    errors = {
        name: {key: x if math.isfinite(x) else None for key, x in estimate.items()}
        for name, estimate in report["errors"].items()
    }
    return {**report, **costs, "errors": errors}


def _from_json(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report that `_to_json` had; earlier ones had the errors as a list of names and numbers."""
    costs = {name: math.nan if report[name] is None else report[name] for name in _COSTS}
    named = report["errors"]
    if isinstance(named, list):
        fields = [f.name for f in dataclasses.fields(ErrorEstimate)]
        named = {name: dict(zip(fields, numbers, strict=True)) for name, numbers in named}
    errors = {
        name: {key: math.inf if x is None else x for key, x in estimate.items()} for name, estimate in named.items()
    }
    return {**report, **costs, "errors": errors}


def head_report(head: HeadPlan) -> dict[str, Any]:
    """What `head_plans` reads, in numbers, texts and lists alone."""
    result = {f.name: getattr(head, f.name) for f in dataclasses.fields(head)}
    del result["measured_error"]
    result["errors"] = {name: dataclasses.asdict(estimate) for name, estimate in head.errors.items()}
    result["engine"] = described(head.engine)
    return result


def table(heads: Iterable[HeadPlan]) -> list[str]:
    """Lines of text: a head each."""
    lines = []
    for i, head in enumerate(heads):
        parts = [f"head {i}: {head.engine_name}"]
        if head.predicted_error is not None:
            parts.append(f"predicted error {head.predicted_error:.1e}")
        parts += [f"{name} {e.relative:.1e} (to {e.high:.1e})" for name, e in head.errors.items()]
        if head.error_bound is not None:
            parts.append(f"bound {head.error_bound:.1e}")
        if head.exact_cost == head.exact_cost:
            parts.append(f"{1e3 * head.cost:.2f} ms expected, exact {1e3 * head.exact_cost:.2f} ms")
        if head.whole_sequence:
            parts.append(f"from the whole sequence: {', '.join(head.whole_sequence)}")
        parts.append(head.missed or head.reason)
        lines.append("; ".join(parts))
    return lines
