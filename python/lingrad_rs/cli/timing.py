"""What ``lingrad bench`` does: times and errors of the engines over the number of tokens, beside PyTorch's kernel."""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from .._files import check_output, whole_file
from ..attention import attention, attention_vjp
from ..errors import ArgumentError, DeviceError
from ..interchange import from_dlpack
from ..spec.engines import Engine, Exact, Polynomial
from ..threads import get_num_threads
from .devices import HOST, Device

__all__ = [
    "Case",
    "Method",
    "Row",
    "Times",
    "check_plot",
    "engines",
    "inputs",
    "interleaved",
    "machine",
    "of_engine",
    "plot",
    "relative_error",
    "scaling",
    "torch_sdpa",
    "write_plot",
]

Array = NDArray[Any]
_Key = TypeVar("_Key")
_R = TypeVar("_R")
Results = tuple[Array, Array, Array, Array]  # out, dq, dk, dv

_TURN = 0.1  # seconds
_TICK = 1e-6  # what a clock may take to be no time at all
# Numbers in a state beyond which a polynomial is not worth a bench.
_LARGEST_STATE = 1 << 24


@dataclass(frozen=True)
class Case:
    """A shape: ``heads`` heads of ``n`` queries and keys of width ``d``, and whether they are masked."""

    n: int
    d: int
    heads: int
    causal: bool


@dataclass(frozen=True)
class Method:
    """A way to compute attention.

    ``prepare(q, k, v, dout, causal)`` returns the forward pass as a call without arguments, and forward and backward
    together as one that returns ``out, dq, dk, dv``. ``order`` is the power of n that the time grows with.
    """

    name: str
    prepare: Callable[..., tuple[Callable[[], object], Callable[[], Results]]]
    order: Literal[1, 2]


@dataclass(frozen=True)
class Times:
    """Seconds: the median over the rounds, the least and the most."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Most less least, over the median."""
        return (self.high - self.low) / self.median


def machine(device: Device = HOST) -> str:
    """The device, what of its software times depend on, and the version of this library."""
    return f"{device.describe()}, lingrad_rs {__version__}"


def inputs(case: Case, score_std: float, dtype: str, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Normal ``q, k, v, dout``, ``(heads, n, d)``, with scores ``q.k/sqrt(d)`` of that standard deviation."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rng.standard_normal((case.heads, case.n, case.d)) for _ in range(4))
    size = math.sqrt(score_std)
    return tuple(x.astype(dtype) for x in (q * size, k * size, v, dout))  # type: ignore[return-value]


def of_engine(name: str, engine: Engine) -> Method:
    """An engine of this library."""

    def prepare(
        q: Array, k: Array, v: Array, dout: Array, causal: bool
    ) -> tuple[Callable[[], object], Callable[[], Results]]:
        def both() -> Results:
            out, vjp = attention_vjp(q, k, v, engine=engine, causal=causal)
            dq, dk, dv = vjp(dout)
            return out, dq, dk, dv

        return lambda: attention(q, k, v, engine=engine, causal=causal), both

    return Method(name, prepare, 2 if isinstance(engine, Exact) else 1)


def engines(degrees: Iterable[int], d: int) -> list[Method]:
    """Exact attention, and the polynomial engine for every degree whose states fit: both gradients, and fitted."""
    methods = [of_engine("exact", Exact())]
    for degree in degrees:
        variants = {
            "": Polynomial(degree=degree),
            " fitted": Polynomial(degree=degree, coefficients="fitted"),
            " consistent": Polynomial(degree=degree, gradient="consistent"),
        }
        for suffix, engine in variants.items():
            potential = degree + (engine.gradient == "closed_form")
            if math.comb(d + potential, potential) * (d + 1) <= _LARGEST_STATE:
                methods.append(of_engine(f"degree {degree}{suffix}", engine))
    return methods


def torch_sdpa(device: Device = HOST) -> Method | None:
    """PyTorch's fused kernel on the device (a CPU: on as many threads), where a PyTorch that computes there is."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch: Any = importlib.import_module("torch")  # which the types of this package know nothing of
    if not device.has_torch(torch):
        return None

    attend = torch.nn.functional.scaled_dot_product_attention

    def prepare(
        q: Array, k: Array, v: Array, dout: Array, causal: bool
    ) -> tuple[Callable[[], object], Callable[[], Results]]:
        torch.set_num_threads(get_num_threads())
        leaves = [torch.from_dlpack(x)[None].requires_grad_() for x in (q, k, v)]
        upstream = torch.from_dlpack(dout)[None]

        def forward() -> object:
            return attend(*leaves, is_causal=causal)

        def both() -> Results:
            for leaf in leaves:
                leaf.grad = None
            out = attend(*leaves, is_causal=causal)
            out.backward(upstream)
            dq, dk, dv = (from_dlpack(leaf.grad[0]) for leaf in leaves)
            return from_dlpack(out.detach()[0]), dq, dk, dv

        return _telling_of_memory(torch, forward, device), _telling_of_memory(torch, both, device)

    return Method(f"PyTorch {torch.__version__.split('+')[0]} SDPA", prepare, 2)


def _telling_of_memory(torch: Any, call: Callable[[], _R], device: Device) -> Callable[[], _R]:
    """The call, which where PyTorch runs out of a GPU's memory does as this library would: once more, then raises."""

    def telling() -> _R:
        try:
            return call()
        except torch.cuda.OutOfMemoryError:
            device.release()
        try:
            return call()
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceError(f"too little memory: {error}") from error

    return telling


def interleaved(calls: Mapping[_Key, Callable[[], object]], rounds: int, device: Device = HOST) -> dict[_Key, Times]:
    """The time of each call. They take turns, so that a change in the machine's speed meets all alike."""
    seconds: dict[_Key, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_turn(call, device))
    return {name: Times(statistics.median(t), min(t), max(t)) for name, t in seconds.items()}


def _turn(call: Callable[[], object], device: Device) -> float:
    """The time of one call, or, where that is short, the mean of as many as fill a while.

    The first of those does not count: it meets cold caches, and threads of the library before it that still spin.
    """
    first = device.seconds(call, 1)
    if first > _TURN:
        return first
    count = math.ceil(_TURN / max(first, _TICK))
    return device.seconds(call, count) / count


def relative_error(got: Array, exact: Array) -> float | None:
    """``||got - exact||_F / ||exact||_F``, in float64; None where exact is 0 and got is not."""
    wide = exact.astype(np.float64)
    error, norm = _norm(got - wide), _norm(wide)
    if norm == 0:
        return 0.0 if error == 0 else None
    return error / norm


def _norm(x: Array) -> float:
    flat = x.ravel()
    return math.sqrt(float(flat @ flat))


@dataclass(frozen=True)
class Row:
    """What was measured of a method at one length; an error relative to exact attention, where that was computed."""

    method: str
    n: int
    forward: Times
    both: Times
    errors: dict[str, float | None] | None

    def worst(self, *parts: str) -> float | None:
        """The greatest error of the parts that have one."""
        errors = [error for part in parts if self.errors and (error := self.errors[part]) is not None]
        return max(errors, default=None)


def scaling(
    methods: list[Method],
    sizes: Iterable[int],
    case: Case,
    *,
    score_std: float,
    dtype: str,
    rounds: int,
    limit: float,
    progress: Callable[[int], None],
    tell: Callable[[str], None],
    device: Device = HOST,
) -> list[Row]:
    """Times every method at every size, errors at those where the exact engine is still timed.

    A method whose forward and backward passes are expected to take more than ``limit`` seconds at a size is left out
    there. The expectation is its time at the size before, grown by its order. What the device has no memory for is left
    out too, and told.
    """
    rows: list[Row] = []
    expected: dict[str, float] = {method.name: 0.0 for method in methods}
    before = None
    for n in sizes:
        if before is not None:
            for method in methods:
                expected[method.name] *= (n / before) ** method.order
        before = n
        at = replace(case, n=n)
        chosen = [method for method in methods if expected[method.name] <= limit]
        needed, free = _bytes(at, len(chosen), dtype), device.free_bytes()
        if free is not None and needed > free:
            tell(
                f"n = {n:,} is left out: its arrays take {_mebibytes(needed)}, and there is room for {_mebibytes(free)}"
            )
        else:
            measured = _at_size(chosen, at, score_std=score_std, dtype=dtype, rounds=rounds, tell=tell, device=device)
            expected |= {row.method: row.both.median for row in measured}
            rows += measured
        progress(n)
    return rows


def _bytes(case: Case, methods: int, dtype: str) -> int:
    """What inputs, the results of all methods and both of them in float64 take together."""
    numbers = case.heads * case.n * case.d
    return 4 * numbers * ((1 + methods) * np.dtype(dtype).itemsize + 2 * 8)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _at_size(
    methods: list[Method],
    case: Case,
    *,
    score_std: float,
    dtype: str,
    rounds: int,
    tell: Callable[[str], None],
    device: Device,
) -> list[Row]:
    """What `_measured` returns, of arrays that are gone then; nothing where there is no memory for them."""
    try:
        arrays = tuple(device.array(x) for x in inputs(case, score_std, dtype))
    except (DeviceError, MemoryError) as error:
        tell(f"n = {case.n:,} is left out: {error}")
        return []
    return _measured(methods, case, arrays, rounds=rounds, tell=tell, device=device)


def _measured(
    methods: list[Method],
    case: Case,
    arrays: tuple[Array, ...],
    *,
    rounds: int,
    tell: Callable[[str], None],
    device: Device,
) -> list[Row]:
    """A row of each method that the device has the memory for."""
    passes: dict[tuple[str, str], Callable[[], object]] = {}
    results: dict[str, Results] = {}
    for method in methods:
        device.release()
        try:
            forward, both = method.prepare(*arrays, case.causal)
            # First calls, which are not timed: a GPU's kernels are compiled in them.
            forward()
            results[method.name] = both()
        except (DeviceError, MemoryError) as error:
            tell(f"{method.name} is left out at n = {case.n:,}: {error}")
            continue
        passes[method.name, "forward"], passes[method.name, "both"] = forward, both
    errors = {}
    if "exact" in results:
        try:
            errors = _errors(results, arrays, case.causal)
        except (DeviceError, MemoryError) as error:
            tell(f"errors at n = {case.n:,} are left out: {error}")
    names = list(results)
    results.clear()
    try:
        times = interleaved(passes, rounds, device)
    except (DeviceError, MemoryError) as error:
        tell(f"n = {case.n:,} is left out: {error}")
        return []
    return [Row(name, case.n, times[name, "forward"], times[name, "both"], errors.get(name)) for name in names]


def _errors(
    results: Mapping[str, Results], arrays: Iterable[Array], causal: bool
) -> dict[str, dict[str, float | None]]:
    """Errors of ``out, dq, dk, dv`` against the exact engine in float64 on the same numbers."""
    q, k, v, dout = (x.astype(np.float64) for x in arrays)
    out, vjp = attention_vjp(q, k, v, engine=Exact(), causal=causal)
    wanted = dict(zip(("out", "dq", "dk", "dv"), (out, *vjp(dout)), strict=True))
    return {
        name: {part: relative_error(x, exact) for x, (part, exact) in zip(result, wanted.items(), strict=True)}
        for name, result in results.items()
    }


def check_plot(path: Path) -> None:
    """An error, before anything is computed, where the plot could not be written."""
    if path.suffix not in (".png", ".svg"):
        raise ArgumentError(f"--plot is {path}; expected a name that ends in .png or .svg")
    check_output("--plot", path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError(f"--plot {path} needs matplotlib: pip install 'lingrad_rs[plot]'")


def write_plot(figure: Any, path: Path) -> None:
    """Writes a figure, whole or not at all."""
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Writes the plot: time over n of the forward pass and of both passes, and time over error at one length."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    figure = Figure(figsize=(15, 5), layout="constrained")
    forward, both, error = figure.subplots(1, 3)
    figure.suptitle(title)
    names = list(dict.fromkeys(row.method for row in rows))
    lengths = [row.n for row in rows if row.errors is not None]
    for i, name in enumerate(names):
        style = {"label": name, "color": f"C{i % 10}", "marker": "os^Dv<>pP*"[i // 10 % 10]}
        own = [row for row in rows if row.method == name]
        n = [row.n for row in own]
        for axes, times in ((forward, [row.forward for row in own]), (both, [row.both for row in own])):
            axes.plot(n, [t.median for t in times], **style)
            axes.fill_between(n, [t.low for t in times], [t.high for t in times], color=style["color"], alpha=0.2)
        for row in own:
            if lengths and row.n == max(lengths) and row.errors is not None:
                error.plot(row.worst("out", "dq", "dk", "dv"), row.both.median, linestyle="none", **style)
    for axes, label in ((forward, "forward"), (both, "forward and backward")):
        axes.set(xscale="log", yscale="log", xlabel="tokens n", ylabel="seconds", title=label)
    where = f" at n = {max(lengths):,}" if lengths else ""
    error.set(
        xscale="log",
        yscale="log",
        xlabel="worst relative error of out, dq, dk, dv",
        ylabel="seconds, forward and backward",
        title=f"time over error{where}",
    )
    for axes in (forward, both, error):
        axes.grid(True, which="both", alpha=0.2)
    both.legend(fontsize="small")
    write_plot(figure, path)
