"""What ``lingrad plan`` does: times and errors of the engines on heads of one's own, and what tolerances choose."""

from __future__ import annotations

import functools
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .. import _files
from ..attention import _arguments, attention, attention_vjp, measure_error, plan_attention
from ..errors import ArgumentError, LingradError, ShapeError
from ..nn.model import is_model
from ..spec.engines import Auto, Engine, Exact, Landmark, Polynomial
from ..spec.plan import ErrorEstimate, HeadPlan
from . import timing

__all__ = ["Choice", "Head", "Scores", "Survey", "Task", "Trial", "heads", "plot", "read", "survey"]

Array = NDArray[Any]

_SAMPLES = 64  # rows, and keys, of a head on which errors are measured
_SCORE_ROWS = 256  # queries whose scores with all keys are looked at
_TILE = 16  # of those at a time
_DEGREES = (1, 2, 3, 4)
_RANKS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Task:
    """What is asked of attention: its mask, the factor of its scores (None: ``1/sqrt(d)``), and whether gradients."""

    causal: bool
    scale: float | None
    gradients: bool


@dataclass(frozen=True)
class Head:
    """One head's ``q, k, v``, and where it stands."""

    layer: int
    head: int
    q: Array
    k: Array
    v: Array


@dataclass(frozen=True)
class Scores:
    """Of the scores of sampled queries with all keys: standard deviation and largest size.

    The same once the mean query and the mean key have been subtracted, which attention does not notice.
    """

    std: float
    largest: float
    centred_std: float
    centred_largest: float


@dataclass(frozen=True)
class Trial:
    """What an engine did.

    ``seconds`` and ``relative_time``, that over the exact engine's, are None where it failed, and ``failure`` is the
    message then. ``meets`` are the tolerances that the upper ends of all ``errors`` are within.
    """

    engine: str
    seconds: float | None
    relative_time: float | None
    errors: dict[str, ErrorEstimate]
    meets: tuple[float, ...]
    failure: str | None


@dataclass(frozen=True)
class Choice:
    """What was chosen within a tolerance.

    ``cost`` is the expected time over the exact engine's, without that of an engine that ``missed``.
    """

    tol: float
    engine: str
    predicted_error: float | None
    errors: dict[str, ErrorEstimate]
    cost: float
    reason: str
    missed: str | None
    whole_sequence: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """What is known of a head. ``left_out`` are the engines with more features than there are keys."""

    layer: int
    head: int
    tokens: int
    d: int
    dtype: str
    scores: Scores
    trials: list[Trial]
    left_out: list[str]
    choices: list[Choice]


def read(path: Path, task: Task, max_tokens: int | None) -> tuple[Array, Array, Array]:
    """The arrays q, k and v of a file, each (layers, heads, n, d), no more than so many tokens of them."""
    if str(path) != "-" and path.suffix not in (".npz", ".safetensors"):
        raise ArgumentError(f"{path} is of an unknown kind; expected a name that ends in .npz or .safetensors")
    with _files.seekable(path) as (file, name):
        q, k, v = _stored(file, name, path.suffix)
    if not 2 <= q.ndim <= 4:
        raise ShapeError(f"q has shape {q.shape}; expected (n, d), (heads, n, d) or (layers, heads, n, d)")
    (q, k, v), _ = _arguments(q, k, v, Exact(), {"causal": task.causal, "scale": task.scale}, half=False)
    if q.size == 0:
        raise ShapeError(f"q has shape {q.shape}; expected at least one token of one head")
    shortened = (x[..., :max_tokens, :] for x in (q, k, v))
    q, k, v = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in shortened)
    return q, k, v


def _stored(file: BinaryIO, name: str, suffix: str) -> tuple[Array, Array, Array]:
    """The arrays q, k and v of an open file, whose first bytes tell its kind where its name does not."""
    if suffix == ".npz" or (not suffix and zipfile.is_zipfile(file)):
        arrays, held = _files.read_npz(file, name, "qkv")
    else:
        stored = _files.SafeTensors(file, name)
        if is_model(stored):
            raise ArgumentError(f"{name} holds a Transformer; expected arrays q, k and v")
        held = list(stored.shapes)
        arrays = stored.read(array for array in "qkv" if array in held)
    for array in "qkv":
        if array not in arrays:
            raise ArgumentError(f"{name} lacks an array {array!r}; it holds {', '.join(held) or 'none'}")
    return arrays["q"], arrays["k"], arrays["v"]


def heads(arrays: tuple[Array, Array, Array], layers: Sequence[int], picked: Sequence[int]) -> list[Head]:
    """The heads of those layers and of those numbers; all of them where none are named."""
    q, k, v = arrays
    group = q.shape[1] // k.shape[1]
    for option, numbers, count in (("--layer", layers, q.shape[0]), ("--head", picked, q.shape[1])):
        for number in numbers:
            if not 0 <= number < count:
                raise ArgumentError(f"{option} is {number}; expected a number from 0 to {count - 1}")
    return [
        Head(layer, head, q[layer, head], k[layer, head // group], v[layer, head // group])
        for layer in sorted(set(layers)) or range(q.shape[0])
        for head in sorted(set(picked)) or range(q.shape[1])
    ]


def survey(
    head: Head, task: Task, tolerances: Sequence[float], *, rounds: int, progress: Callable[[float], object]
) -> Survey:
    """What engines cost and miss on a head, and what each tolerance chooses."""
    n, d = head.q.shape
    shape = (n, head.v.shape[1])
    dout = np.random.default_rng(0).standard_normal(shape).astype(head.q.dtype)
    choices = [_choice(head, task, tol, dout) for tol in tolerances]
    progress(0.2)
    engines, left_out = _engines(task, d, len(head.k))
    trials = _trials(head, task, engines, dout, tolerances, rounds, progress)
    return Survey(
        layer=head.layer,
        head=head.head,
        tokens=n,
        d=d,
        dtype=str(head.q.dtype),
        scores=_scores(head, task),
        trials=trials,
        left_out=left_out,
        choices=choices,
    )


def _scores(head: Head, task: Task) -> Scores:
    q, k = head.q.astype(np.float64), head.k.astype(np.float64)
    rows = np.sort(np.random.default_rng(0).permutation(len(q))[:_SCORE_ROWS])
    scale = 1 / math.sqrt(q.shape[1]) if task.scale is None else task.scale
    std, largest = _spread(q, k, rows, scale, task.causal)
    centred_std, centred_largest = _spread(q - q.mean(axis=0), k - k.mean(axis=0), rows, scale, task.causal)
    return Scores(std, largest, centred_std, centred_largest)


def _spread(q: Array, k: Array, rows: Array, scale: float, causal: bool) -> tuple[float, float]:
    """The standard deviation and the largest size of the scores of some rows, all those that the mask leaves."""

    def tiles() -> Iterator[Array]:
        for start in range(0, len(rows), _TILE):
            tile = rows[start : start + _TILE]
            scores = scale * (q[tile] @ k.T)
            yield scores[np.arange(len(k)) <= tile[:, None]] if causal else scores.ravel()

    sums = [(len(s), s.sum(), np.abs(s).max()) for s in tiles()]
    count = sum(part[0] for part in sums)
    mean = sum(part[1] for part in sums) / count
    variance = sum(np.square(s - mean).sum() for s in tiles()) / count
    return math.sqrt(variance), float(max(part[2] for part in sums))


def _engines(task: Task, d: int, keys: int) -> tuple[dict[str, Engine], list[str]]:
    """The engines to try by name, and the names of those that have more features than there are keys."""
    engines: dict[str, Engine] = {"exact": Exact()}
    left_out = []
    for degree in _DEGREES:
        potential = degree + task.gradients  # the closed form's gradient needs one degree more
        name = f"degree {degree}"
        if math.comb(d + potential, potential) <= keys:
            engines[name] = Polynomial(degree, "fitted", shift="none" if task.causal else "mean")
        else:
            left_out.append(name)
    for rank in _RANKS:
        name = f"{rank} landmarks"
        if rank <= keys:
            engines[name] = Landmark(rank)
        else:
            left_out.append(name)
    return engines, left_out


def _trials(
    head: Head,
    task: Task,
    engines: dict[str, Engine],
    dout: Array,
    tolerances: Sequence[float],
    rounds: int,
    progress: Callable[[float], object],
) -> list[Trial]:
    errors: dict[str, dict[str, ErrorEstimate]] = {}
    failures: dict[str, str] = {}
    for i, (name, engine) in enumerate(engines.items()):
        try:
            errors[name] = _measured(head, task, engine, dout)
        except LingradError as error:
            # What the exact engine refuses, and an internal error, is no failure of one engine.
            if isinstance(engine, Exact) or type(error) is LingradError:
                raise
            failures[name] = str(error)
        progress(0.2 + 0.3 * (i + 1) / len(engines))
    calls = {name: functools.partial(_run, head, task, engines[name], dout) for name in errors}
    times = timing.interleaved(calls, rounds)
    exact = times["exact"].median
    trials = []
    for name, engine in engines.items():
        own = errors.get(name, {})
        met = tuple(tol for tol in tolerances if name in errors and _meets(engine, own, tol))
        seconds = times[name].median if name in times else None
        relative = None if seconds is None else seconds / exact
        trials.append(Trial(name, seconds, relative, own, met, failures.get(name)))
    return trials


def _meets(engine: Engine, errors: dict[str, ErrorEstimate], tol: float) -> bool:
    return isinstance(engine, Exact) or all(error.high <= tol for error in errors.values())


def _run(head: Head, task: Task, engine: Engine, dout: Array) -> None:
    """What is timed."""
    if task.gradients:
        attention_vjp(head.q, head.k, head.v, engine=engine, causal=task.causal, scale=task.scale)[1](dout)
    else:
        attention(head.q, head.k, head.v, engine=engine, causal=task.causal, scale=task.scale)


def _measured(head: Head, task: Task, engine: Engine, dout: Array) -> dict[str, ErrorEstimate]:
    q, k, v = head.q, head.k, head.v
    if task.gradients:
        _, vjp = attention_vjp(q, k, v, engine=engine, causal=task.causal, scale=task.scale)
        vjp(dout, samples=_SAMPLES)
        return dict(vjp.heads[0].errors)
    out = attention(q, k, v, engine=engine, causal=task.causal, scale=task.scale)
    return {"out": measure_error(q, k, v, out, samples=_SAMPLES, causal=task.causal, scale=task.scale)}


def _choice(head: Head, task: Task, tol: float, dout: Array) -> Choice:
    plan = _plan(head, task, tol, dout)
    exact = isinstance(plan.engine, Exact)  # cost and prediction are those of the engine that missed, if one did
    return Choice(
        tol=tol,
        engine=plan.engine_name,
        predicted_error=None if exact else plan.predicted_error,
        errors=dict(plan.errors),
        cost=1.0 if exact else plan.cost / plan.exact_cost,
        reason=plan.reason,
        missed=plan.missed,
        whole_sequence=plan.whole_sequence,
    )


def _plan(head: Head, task: Task, tol: float, dout: Array) -> HeadPlan:
    """The plan of a head; with gradients, after these have been computed and held against exact ones."""
    q, k, v = head.q, head.k, head.v
    if not task.gradients:
        return plan_attention(q, k, v, tol=tol, gradients=False, causal=task.causal, scale=task.scale).heads[0]
    _, vjp = attention_vjp(q, k, v, engine=Auto(tol), causal=task.causal, scale=task.scale)
    vjp(dout)
    return vjp.heads[0]


def worst(errors: Iterable[ErrorEstimate]) -> ErrorEstimate | None:
    """The error whose interval reaches highest."""
    return max(errors, key=lambda error: error.high, default=None)


def plot(surveys: Sequence[Survey], path: Path, title: str) -> None:
    """Writes the plot: for each head, the worst error of each engine over its time, and the tolerances."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    columns = min(len(surveys), 3)
    rows = math.ceil(len(surveys) / columns)
    figure = Figure(figsize=(max(5 * columns, 7), 4 * rows + 1.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    names = list(dict.fromkeys(trial.engine for one in surveys for trial in one.trials))
    handles = {}
    for axes, one in zip(panels, surveys, strict=False):
        for trial in one.trials:
            error = worst(trial.errors.values())
            if trial.relative_time is None or error is None or not 0 < error.relative < math.inf:
                continue
            i = names.index(trial.engine)
            down, up = max(error.relative - error.low, 0), max(min(error.high, 1e9) - error.relative, 0)
            handles[trial.engine] = axes.errorbar(
                trial.relative_time,
                error.relative,
                yerr=[[down], [up]],
                linestyle="none",
                color=f"C{i % 10}",
                marker="s" if "landmarks" in trial.engine else "o",
                capsize=3,
            )
        for choice in one.choices:
            axes.axhline(choice.tol, color="black", linestyle="--", linewidth=0.8)
            where = {"xy": (1.01, choice.tol), "xycoords": ("axes fraction", "data")}
            axes.annotate(f"{choice.tol:g}", **where, fontsize="small", va="center")
        axes.axvline(1, color="grey", linestyle=":", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="time relative to exact")
        axes.set_title(f"layer {one.layer}, head {one.head}")
        axes.grid(True, which="major", alpha=0.3)
    for axes in panels[len(surveys) :]:
        axes.set_axis_off()
    figure.supylabel("worst relative error, 95% interval")
    drawn = [name for name in names if name in handles]
    figure.legend([handles[name] for name in drawn], drawn, loc="outside lower center", ncols=5, fontsize="small")
    timing.write_plot(figure, path)
