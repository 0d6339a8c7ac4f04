"""The command ``lingrad``.

It computes the gradient of every weight of a small transformer on a long text, times engines, and tells which of them
fit heads of one's own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import signal
import sys
import sysconfig
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import __version__, _backend, _bench, _files, _survey
from ._devices import HOST, Device, Gpu, memory_bytes
from .engines import Auto, Engine, Exact, Landmark, Polynomial
from .errors import ArgumentError, LingradError
from .plan import ErrorEstimate, HeadPlan
from .threads import set_num_threads
from .transformer import GradientReport, Transformer, TransformerConfig, check_stored, is_model, save, stored_config

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as missing:
    sys.exit(f"lingrad needs {missing.name}: pip install 'lingrad_rs[cli]'")

__all__ = ["main"]

_DEFAULT_ENGINE = Polynomial(coefficients="fitted")
# The engines by name, with the options that they have unless others are given.
_ENGINES: dict[str, Engine] = {
    "polynomial": _DEFAULT_ENGINE,
    "exact": Exact(),
    "landmark": Landmark(),
    "auto": Auto(1e-2),
}
# The options of an engine, and whose they are.
_OPTIONS = {"degree": "polynomial", "coefficients": "polynomial", "rank": "landmark", "tol": "auto"}
_OPTIONS["strict_causal"] = "auto"
_RESULTS = ("out", "dq", "dk", "dv")
_BYTES = 256  # the vocabulary: a token is a byte
_SAMPLES = 256  # rows of each layer's attention whose error is measured

_STDIN = Path("-")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _whole_number(text: str | int) -> int:
    """An integer, also as 1e6."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number.adjusted() > 30 or number != number.to_integral_value():
        raise typer.BadParameter(f"{text!r} is not an integer.")
    return int(number)


def _positive_number(text: str | int) -> int:
    number = _whole_number(text)
    if number < 1:
        raise typer.BadParameter(f"{number} is not at least 1.")
    return number


_integer: dict[str, Any] = {"parser": _whole_number, "metavar": "INTEGER"}
_positive: dict[str, Any] = {"parser": _positive_number, "metavar": "INTEGER"}

# Options that several commands have.
PlotOption = Annotated[Path | None, typer.Option(help="Draw it there (.png or .svg).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads.", show_default="RAYON_NUM_THREADS, or the machine's")
]


class EngineName(str, Enum):
    """The engines by name."""

    polynomial = "polynomial"
    exact = "exact"
    landmark = "landmark"
    auto = "auto"


class CoefficientsName(str, Enum):
    """Where the polynomial's coefficients come from."""

    fitted = "fitted"
    taylor = "taylor"


class Reference(str, Enum):
    """What can be compared with."""

    exact = "exact"


class FloatName(str, Enum):
    """The dtypes by name."""

    float32 = "float32"
    float64 = "float64"


class DeviceName(str, Enum):
    """The devices by name."""

    cpu = "cpu"
    gpu = "gpu"


def main() -> None:
    """Run the command line."""
    # A stream that was closed before the start is None, and its number free for the next file to be opened.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the end)
    # Where nobody reads the output any more (`| head`), the process ends at once and quietly, as others do.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # while it can be told that it fails
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python, which tries again at the end
        typer.echo(f"lingrad: standard output: {error.strerror}", err=True)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lingrad_rs {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Gradients of long-context transformers in almost linear time, with the error known."""


@app.command()
def grad(
    text: Annotated[
        Path | None,
        typer.Option(
            help="The text, read as bytes; - is standard input.", show_default="the sources of Python's library"
        ),
    ] = None,
    params: Annotated[
        Path | None,
        typer.Option(
            help="Weights of one's own (safetensors; - is standard input).", show_default="drawn by SmallInit"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many bytes of the text to read.", **_positive)] = 16384,
    layers: Annotated[int | None, typer.Option(help="Layers.", show_default="4, or as in --params", **_integer)] = None,
    d_model: Annotated[
        int | None, typer.Option(help="Width of a token.", show_default="64, or as in --params", **_integer)
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads.", show_default="4, or as in --params", **_integer)] = None,
    d_ff: Annotated[
        int | None, typer.Option(help="Hidden units.", show_default="4 d-model, or as in --params", **_integer)
    ] = None,
    dtype: Annotated[
        FloatName | None, typer.Option(help="Precision.", show_default="float32, or as in --params")
    ] = None,
    engine: Annotated[
        EngineName | None, typer.Option(help="How attention is computed.", show_default="polynomial, or as in --params")
    ] = None,
    degree: Annotated[int | None, typer.Option(help="Degree of the polynomial.", show_default="2")] = None,
    coefficients: Annotated[
        CoefficientsName | None, typer.Option(help="Its coefficients.", show_default="fitted")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Landmarks.", show_default="256")] = None,
    tol: Annotated[
        float | None,
        typer.Option(help="Choose for each head within this error: the engine is auto.", show_default="1e-2 with auto"),
    ] = None,
    strict_causal: Annotated[
        bool, typer.Option("--strict-causal", help="With auto, use no constants taken from later tokens.")
    ] = False,
    compare: Annotated[
        Reference | None, typer.Option(help="Also compute exactly: errors of all gradients, and the speed-up.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights that are drawn.")] = 0,
    threads: ThreadsOption = None,
    json_: JsonOption = False,
    out: Annotated[Path | None, typer.Option(help="Write the gradients there (safetensors).")] = None,
) -> None:
    """Compute the gradient of every weight of a transformer that predicts the next byte of a text."""
    with _clean_exit():
        if threads is not None:
            set_num_threads(threads)
        if out is not None:
            _files.check_output("--out", out)
        if text == params == _STDIN:
            raise ArgumentError("--text and --params are both -; expected standard input to be one of them")
        _check_text(text, tokens + 1)
        sizes = {"n_layers": layers, "d_model": d_model, "n_heads": heads, "d_ff": d_ff}
        options = {
            "degree": degree,
            "coefficients": None if coefficients is None else coefficients.value,
            "rank": rank,
            "tol": tol,
            "strict_causal": strict_causal or None,
        }
        given = {name: value for name, value in options.items() if value is not None}
        chosen = functools.partial(_engine, None if engine is None else engine.value, given)
        if params is None:
            config, drawn = _new_config(sizes, chosen(_DEFAULT_ENGINE)), "float32" if dtype is None else dtype.value
            _check_memory(config, tokens, drawn)
            model = Transformer(config, seed=seed, dtype=drawn)
        else:
            model = _stored_model(params, sizes, chosen, None if dtype is None else dtype.value)
            _check_memory(model.config, tokens, model.params["embed"].dtype)
        read = _read_text(text, tokens + 1)
        inputs, targets = read[:-1], read[1:]

        with _progress("gradient") as progress:
            start = time.perf_counter()
            report = model.gradient_report(inputs, targets, samples=_SAMPLES, progress=progress)
            seconds = time.perf_counter() - start
        peak = _peak_memory()
        comparison = None if compare is None else _compare(model, inputs, targets, report, seconds)
        if out is not None:
            save(out, report.grads)
        if json_:
            _print_json(_summary(report, tokens, seconds, peak, comparison))
        else:
            _print(report, tokens, seconds, peak, comparison)


@app.command()
def bench(
    d: Annotated[int, typer.Option("--d", help="Width of a head.", **_positive)] = 16,
    heads: Annotated[int, typer.Option(help="Heads.", **_positive)] = 1,
    tokens: Annotated[int, typer.Option(help="The greatest length; the others are halves of it.", **_positive)] = 65536,
    degree: Annotated[
        list[int] | None, typer.Option(min=1, help="Degrees of the polynomial.", show_default="2")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal/--full", help="With or without a causal mask.")] = True,
    score_std: Annotated[float, typer.Option(min=0, help="Standard deviation of the scores.")] = 0.3,
    dtype: Annotated[FloatName, typer.Option(help="Precision.")] = FloatName.float32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each method.")] = 5,
    limit: Annotated[float, typer.Option(min=0, help="Seconds that one forward and backward pass may take.")] = 3.0,
    device: Annotated[
        DeviceName, typer.Option(help="Where: a GPU needs CuPy, and times by its own clock.")
    ] = DeviceName.cpu,
    threads: ThreadsOption = None,
    plot: PlotOption = None,
    json_: JsonOption = False,
) -> None:
    """Time the engines over the number of tokens, beside PyTorch's fused kernel where it is installed.

    Methods take turns within every round. Errors are relative to exact attention in float64, on normal random numbers.
    """
    with _clean_exit():
        if threads is not None:
            if device is DeviceName.gpu:
                raise ArgumentError("--threads needs --device cpu; got gpu")
            set_num_threads(threads)
        if plot is not None:
            _bench.check_plot(plot)
        where: Device = HOST if device is DeviceName.cpu else Gpu(_backend.cupy())
        methods = _bench.engines(degree or [2], d)
        peer = _bench.torch_sdpa(where)
        methods += [] if peer is None else [peer]
        sizes = [tokens >> halved for halved in range(8) if halved == 0 or tokens >> halved >= 1024][::-1]
        total = sum(sizes)
        notes: list[str] = []
        with _progress("bench") as progress:
            rows = _bench.scaling(
                methods,
                sizes,
                _bench.Case(tokens, d, heads, causal),
                score_std=score_std,
                dtype=dtype.value,
                rounds=rounds,
                limit=limit,
                progress=lambda n: progress(sum(size for size in sizes if size <= n) / total),
                tell=notes.append,
                device=where,
            )
        for note in notes:
            typer.echo(f"lingrad: {note}", err=True)
        if not rows:
            raise ArgumentError("nothing could be timed")
        machine = _bench.machine(where)
        title = (
            f"{'causal' if causal else 'full'} attention, d = {d}, {heads} heads, {dtype.value}, score std {score_std}"
        )
        if plot is not None:
            _bench.plot(rows, plot, f"{title}\n{machine}")
        if json_:
            _print_json({"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]})
        else:
            _print_bench(rows, machine, title, limit)
            if peer is None:
                _console().print(f"{where.torch} is not installed; with it, its fused kernel takes part.")


def _print_json(value: object) -> None:
    """As one line; null in place of NaN and infinity, which JSON does not have."""

    def finite(x: object) -> object:
        if isinstance(x, Mapping):
            return {name: finite(part) for name, part in x.items()}
        if isinstance(x, list | tuple):
            return [finite(part) for part in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    typer.echo(json.dumps(finite(value), allow_nan=False))


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _print_bench(rows: list[_bench.Row], machine: str, title: str, limit: float) -> None:
    console = _console()
    console.print(machine)
    table = Table(title=title)
    for header in (
        "n",
        "method",
        "forward",
        "spread",
        "and backward",
        "spread",
        "exact / this",
        "out",
        "worst gradient",
    ):
        table.add_column(header, no_wrap=True, justify="left" if header == "method" else "right")
    for n in dict.fromkeys(row.n for row in rows):
        at = [row for row in rows if row.n == n]
        exact = next((row.both.median for row in at if row.method == "exact"), None)
        for i, row in enumerate(at):
            times = [text for t in (row.forward, row.both) for text in (f"{1e3 * t.median:.1f} ms", f"{t.spread:.0%}")]
            ratio = "" if exact is None else f"{exact / row.both.median:.2f}"
            errors = ("" if e is None else f"{e:.1e}" for e in (row.worst("out"), row.worst("dq", "dk", "dv")))
            texts = (*times, ratio, *errors)
            table.add_row(f"{n:,}" if i == 0 else "", row.method, *texts, end_section=i + 1 == len(at))
    console.print(table)
    console.print(
        f"Medians; spread: most less least, over the median. Left out: what would take more than {limit:g} s."
    )


@app.command()
def plan(
    file: Annotated[
        Path,
        typer.Argument(
            help="Arrays q, k, v (.npz or .safetensors; - is standard input): (n, d), (heads, n, d) or "
            "(layers, heads, n, d)."
        ),
    ],
    causal: Annotated[bool, typer.Option("--causal/--full", help="With or without a causal mask.")] = True,
    scale: Annotated[float | None, typer.Option(help="Factor of the scores.", show_default="1/sqrt(d)")] = None,
    tol: Annotated[
        list[float] | None, typer.Option(help="Tolerances of relative errors.", show_default="1e-1 1e-2 1e-3")
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients/--forward-only", help="Forward and backward, or forward alone.")
    ] = True,
    layer: Annotated[list[int] | None, typer.Option(help="Only these layers.", show_default="all")] = None,
    head: Annotated[list[int] | None, typer.Option(help="Only these heads.", show_default="all")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Only so many tokens.", show_default="all", **_positive)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 3,
    threads: ThreadsOption = None,
    plot: PlotOption = None,
    json_: JsonOption = False,
) -> None:
    """Tell what every engine costs and misses on heads of your own, and what is chosen within tolerances.

    Errors are measured on sampled rows and keys that are computed exactly. Engines take turns within every round.
    """
    with _clean_exit():
        if threads is not None:
            set_num_threads(threads)
        if plot is not None:
            _bench.check_plot(plot)
        task = _survey.Task(causal, scale, gradients)
        tolerances = sorted(set(tol or [1e-1, 1e-2, 1e-3]), reverse=True)
        picked = _survey.heads(_survey.read(file, task, max_tokens), layer or [], head or [])
        surveys = []
        with _progress("plan") as progress:
            for i, one in enumerate(picked):
                surveys.append(
                    _survey.survey(
                        one,
                        task,
                        tolerances,
                        rounds=rounds,
                        progress=lambda done, i=i: progress((i + done) / len(picked)),
                    )
                )
        first = surveys[0]
        title = (
            f"{'causal' if causal else 'full'} attention{', with gradients' if gradients else ', forward alone'}, "
            f"{first.tokens:,} tokens, d = {first.d}, {first.dtype}"
        )
        if plot is not None:
            _survey.plot(
                surveys, plot, f"{'standard input' if file == _STDIN else file.name}: {title}\n{_bench.machine()}"
            )
        if json_:
            _print_json(
                {
                    "machine": _bench.machine(),
                    "causal": causal,
                    "gradients": gradients,
                    "heads": [dataclasses.asdict(survey) for survey in surveys],
                }
            )
        else:
            _print_surveys(surveys, title, gradients)


def _print_surveys(surveys: Sequence[_survey.Survey], title: str, gradients: bool) -> None:
    console = _console()
    console.print(_bench.machine())
    console.print(title)
    for survey in surveys:
        s = survey.scores
        console.print(
            f"\nLayer {survey.layer}, head {survey.head}: scores of standard deviation {s.std:.2g}, the largest "
            f"{s.largest:.2g} in size; with means subtracted {s.centred_std:.2g} and {s.centred_largest:.2g}."
        )
        _print_fitting(console, functools.partial(_table_of_trials, survey, gradients))
        for trial in survey.trials:
            if trial.failure is not None:
                console.print(f"{trial.engine} fails: {_short(trial.failure, 90)}")
        if survey.left_out:
            console.print(f"Left out, with more features than keys: {', '.join(survey.left_out)}.")
        console.print(_table_of_choices(survey))
    console.print(
        "Medians of times. Errors are relative, of sampled rows, in parentheses the upper ends of 95% intervals; "
        "within: the least tolerance that all these upper ends are within."
    )


def _table_of_trials(survey: _survey.Survey, gradients: bool, *, ends: bool) -> Table:
    results = _RESULTS if gradients else ("out",)
    rows = []
    for trial in survey.trials:
        if trial.seconds is None or trial.relative_time is None:
            rows.append((trial.engine, "fails", *[""] * (len(results) + 2)))
            continue
        times = (f"{1e3 * trial.seconds:.2f}", f"{trial.relative_time:.2f}")
        errors = (_error_text(trial.errors.get(x), ends=ends) for x in results)
        rows.append((trial.engine, *times, *errors, f"{min(trial.meets):g}" if trial.meets else ""))
    return _table(("engine", "ms", "of exact", *results, "within"), rows, whole=ends)


def _table_of_choices(survey: _survey.Survey) -> Table:
    rows = []
    for choice in survey.choices:
        predicted = "" if choice.predicted_error is None else _number(choice.predicted_error)
        measured = _error_text(_survey.worst(choice.errors.values()), ends=True)
        why = _short(choice.missed or choice.reason, 100)
        rows.append((f"{choice.tol:g}", choice.engine, predicted, measured, f"{choice.cost:.2f}", why))
    return _table(("tolerance", "choice", "predicted", "worst measured", "cost of exact", "why"), rows, whole=False)


@contextmanager
def _clean_exit() -> Iterator[None]:
    """No traceback for what the user can mend: exit code 2, or 130 after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except MemoryError as error:
        _fail(f"there is too little memory: {error}" if str(error) else "there is too little memory")
    except (LingradError, OSError, ImportError) as error:
        if type(error) is LingradError:  # an internal error, which the user cannot mend
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"lingrad: {message}", err=True)
    raise typer.Exit(2)


def _engine(name: str | None, options: Mapping[str, Any], default: Engine) -> Engine:
    """The engine that was asked for: the default, with the options that were given in place of its own."""
    if name is None:
        name = "auto" if "tol" in options else _engine_name(default)
    for option in options:
        if _OPTIONS[option] != name:
            raise ArgumentError(f"--{option.replace('_', '-')} needs --engine {_OPTIONS[option]}; got {name}")
    return dataclasses.replace(default if _engine_name(default) == name else _ENGINES[name], **options)


def _new_config(sizes: Mapping[str, int | None], engine: Engine) -> TransformerConfig:
    defaults = {"n_layers": 4, "d_model": 64, "n_heads": 4}
    known: dict[str, Any] = defaults | {name: size for name, size in sizes.items() if size is not None}
    known.setdefault("d_ff", 4 * known["d_model"])
    return TransformerConfig(**known, vocab_size=_BYTES, engine=engine)


def _check_memory(config: TransformerConfig, tokens: int, dtype: DTypeLike) -> None:
    """An error, before anything is made, where there cannot be the memory for what is kept at the same time."""
    itemsize, have = np.dtype(dtype).itemsize, memory_bytes()
    parameters = 2 * itemsize * config.param_count()
    inputs = itemsize * (config.n_layers + 1) * tokens * config.d_model
    if have is not None and parameters + inputs > have:
        raise ArgumentError(
            f"--layers {config.n_layers} --d-model {config.d_model} --d-ff {config.d_ff} --tokens {tokens} would take "
            f"{parameters + inputs:,} bytes: {parameters:,} for the parameters and their gradients, {inputs:,} for "
            f"the layers' inputs; there are {have:,}"
        )


def _stored_model(
    path: Path, sizes: Mapping[str, int | None], engine: Callable[[Engine], Engine], dtype: str | None
) -> Transformer:
    with _files.seekable(path) as (file, name):
        stored = _files.SafeTensors(file, name)
        if is_model(stored):
            config = stored_config(stored)
            config = dataclasses.replace(config, engine=engine(config.engine))
        else:
            config = _config_of(name, stored.shapes, sizes["n_heads"] or 4, engine(_DEFAULT_ENGINE))
            check_stored(stored, config)
            # Of another model, perhaps: no configuration says that this is all of it.
            for tensor in stored.shapes.keys() - config.param_shapes().keys():
                raise ArgumentError(f"{name} holds {tensor!r}, which the model does not have")
        params = stored.read(config.param_shapes())
    for size, value in sizes.items():
        if value is not None and value != getattr(config, size):
            raise ArgumentError(f"{size} is {value}; expected {getattr(config, size)} to match {name}")
    found = params["embed"].dtype
    if dtype is not None and found != np.dtype(dtype):
        raise ArgumentError(f"--dtype is {dtype}; expected {found} to match {name}")
    return Transformer(config, params)


def _config_of(path: str, shapes: Mapping[str, tuple[int, ...]], n_heads: int, engine: Engine) -> TransformerConfig:
    """The configuration that bare parameters tell, all but the number of heads."""

    def shape(name: str) -> tuple[int, int]:
        if len(shapes.get(name, ())) != 2:
            raise ArgumentError(f"{path} lacks a matrix {name!r}, so it does not hold the parameters of a Transformer")
        rows, columns = shapes[name]
        return rows, columns

    vocab_size, d_model = shape("embed")
    layers = {match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    width = max(d_model // n_heads, 1)
    norm: Literal["rms", "layer"] = "layer" if "norm.bias" in shapes else "rms"
    return TransformerConfig(
        n_layers=max(len(layers), 1),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=max(shape("layers.0.attn.w_k")[1] // width, 1),
        d_ff=shape("layers.0.ffn.w_in")[1],
        vocab_size=vocab_size,
        norm=norm,
        engine=engine,
    )


def _check_text(path: Path | None, size: int) -> None:
    """An error at once where a text is known to be shorter; how much a pipe holds, nobody knows."""
    if path is None:
        _check_length("the standard library", len(_library_sources(size)), size)
    elif path.is_file() and (held := path.stat().st_size):  # which is 0 for what a system makes up when it is read
        _check_length(str(path), held, size)


def _check_length(name: str, held: int, size: int) -> None:
    if held < size:
        raise ArgumentError(
            f"the text ({name}) has {held} bytes; expected at least {size}, one more than --tokens; "
            "give a longer --text or fewer --tokens"
        )


def _read_text(path: Path | None, size: int) -> NDArray[np.uint8]:
    """The first ``size`` bytes of the text."""
    if path is None:
        return np.frombuffer(_library_sources(size), np.uint8)
    if path == _STDIN:
        name, text = "standard input", _read_bytes(_files.standard_input(), size)
    else:
        name = str(path)
        with path.open("rb") as file:
            text = _read_bytes(file, size)
    _check_length(name, len(text), size)
    return np.frombuffer(text, np.uint8)


def _read_bytes(file: BinaryIO, size: int) -> bytearray:
    """No more than so many bytes; memory is taken for those that are there."""
    text = bytearray()
    while len(text) < size and (block := file.read(min(size - len(text), 1 << 20))):
        text += block
    return text


def _library_sources(size: int) -> bytes:
    """The sources of Python's own standard library, file after file in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            continue
        text += path.read_bytes()
        if len(text) >= size:
            break
    return bytes(text[:size])


@contextmanager
def _progress(label: str) -> Iterator[Callable[[float], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


def _peak_memory() -> int | None:
    """The most memory that the process has held, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _compare(
    model: Transformer,
    inputs: NDArray[np.uint8],
    targets: NDArray[np.uint8],
    report: GradientReport,
    seconds: float,
) -> dict[str, Any]:
    """The relative error of every gradient, and how much longer the exact one takes."""
    reference = Transformer(dataclasses.replace(model.config, engine=Exact()), model.params)
    with _progress("exact gradient") as progress:
        start = time.perf_counter()
        _, exact = reference.value_and_grad(inputs, targets, progress=progress)
        exact_seconds = time.perf_counter() - start
    errors = {name: _bench.relative_error(report.grads[name], grad) for name, grad in exact.items()}
    return {"relative_error": errors, "speedup": exact_seconds / seconds}


def _engine_name(engine: Engine) -> str:
    return type(engine).__name__.lower()


def _head(head: HeadPlan) -> dict[str, Any]:
    errors = {name: head.errors[name].relative if name in head.errors else None for name in _RESULTS}
    return {
        "engine": head.engine_name,
        "errors": errors,
        "error_bound": head.error_bound,
        "reason": head.reason,
        "missed": head.missed,
        "whole_sequence": list(head.whole_sequence),
    }


def _summary(
    report: GradientReport, tokens: int, seconds: float, peak: int | None, comparison: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "loss": report.loss,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak,
        "layers": [
            {
                "engine": _engine_name(layer.engine),
                "measured_error": None if layer.measured_error is None else layer.measured_error.relative,
                "grad_norm": layer.grad_norm,
                "heads": [_head(head) for head in layer.heads],
            }
            for layer in report.layers
        ],
        "compare": comparison,
    }


def _print(
    report: GradientReport, tokens: int, seconds: float, peak: int | None, comparison: dict[str, Any] | None
) -> None:
    console = _console()
    console.print(f"loss             {report.loss:.6f} nats a byte")
    console.print(f"time             {seconds:.3f} s for {tokens} tokens, {tokens / seconds:,.0f} tokens/s")
    if peak is not None:
        console.print(f"peak memory      {peak / 2**20:,.0f} MiB")
    table = Table("layer", "gradient norm", "engine", "error of attention (95% interval)")
    for i, layer in enumerate(report.layers):
        e = layer.measured_error
        error = "" if e is None else f"{e.relative:.2e} ({e.low:.1e} to {e.high:.1e})"
        table.add_row(str(i), f"{layer.grad_norm:.4e}", _engines_of(layer.heads), error)
    console.print(table)
    _print_fitting(console, functools.partial(_table_of_heads, report))
    if comparison is not None:
        errors: dict[str, float | None] = comparison["relative_error"]
        table = Table("gradient of", "error relative to exact")
        for name, error in errors.items():
            table.add_row(name, "exact is 0" if error is None else f"{error:.2e}")
        console.print(table)
        worst = max((error for error in errors.values() if error is not None), default=0.0)
        console.print(f"worst error      {worst:.2e}")
        console.print(f"speed-up         {comparison['speedup']:.2f} times as fast as exact")


def _engines_of(heads: Sequence[HeadPlan]) -> str:
    """The engines of heads in a few words, with how many have each where they differ."""
    counts = Counter(head.engine_name for head in heads)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{count} {name}" for name, count in counts.most_common())


def _table_of_heads(report: GradientReport, *, ends: bool) -> Table:
    """A line a head, with the upper ends of the errors' intervals where these are asked for."""
    planned = any(isinstance(layer.engine, Auto) for layer in report.layers)
    rows = []
    for i, layer in enumerate(report.layers):
        for j, head in enumerate(layer.heads):
            errors = (_error_text(head.errors.get(name), ends=ends) for name in _RESULTS)
            bound = "" if head.error_bound is None else _number(head.error_bound)
            why = (_short(head.missed or head.reason),) if planned else ()
            rows.append((str(i), str(j), head.engine_name, *errors, bound, *why))
    headers = ("layer", "head", "engine", *_RESULTS, "bound", *(("why",) if planned else ()))
    title = "errors of each head" + (" (upper ends of 95% intervals)" if ends else "")
    return _table(headers, rows, title, whole=ends)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, *, whole: bool) -> Table:
    """Words to the left and numbers to the right, with every cell but the reasons in one line where they are whole."""
    table = Table(title=title, title_justify="left")
    for i, header in enumerate(headers):
        justify = "left" if header in ("engine", "choice", "why") else "right"
        fixed = whole and header != "why"
        width = max(len(text) for text in (header, *(row[i] for row in rows))) if fixed else None
        table.add_column(header, justify=justify, no_wrap=fixed, min_width=width)
    for row in rows:
        table.add_row(*row)
    return table


def _print_fitting(console: Console, table: Callable[..., Table]) -> None:
    """The table with the ends of intervals where there is room for them, else without."""
    full = table(ends=True)
    wide = console.options.update(width=10 * console.width)
    console.print(full if console.measure(full, options=wide).minimum <= console.width else table(ends=False))


def _number(x: float) -> str:
    """Two digits and an exponent, with no zeros in front of it."""
    return re.sub(r"e([+-])0*(?=\d)", lambda match: "e" + match[1].replace("+", ""), f"{x:.1e}")


def _error_text(error: ErrorEstimate | None, *, ends: bool) -> str:
    if error is None:
        return ""
    return _number(error.relative) + (f" ({_number(error.high)})" if ends else "")


def _short(text: str, width: int = 56) -> str:
    """The first words of a text, as they are, with no markup."""
    return escape(textwrap.shorten(text, width, placeholder=" …"))
