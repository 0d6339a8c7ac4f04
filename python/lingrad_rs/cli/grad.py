"""``lingrad grad``: the gradient of every weight of a small transformer on a long text."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import typer
from numpy.typing import DTypeLike, NDArray
from rich.table import Table

from .. import _files
from ..errors import ArgumentError
from ..nn.model import GradientReport, Transformer, TransformerConfig, check_stored, is_model, save, stored_config
from ..spec.engines import Auto, Engine, Exact, Landmark, Polynomial
from ..spec.plan import HeadPlan
from ..threads import set_num_threads
from . import timing
from .app import (
    INTEGER,
    POSITIVE,
    RESULTS,
    STDIN,
    FloatName,
    JsonOption,
    ThreadsOption,
    app,
    clean_exit,
    error_text,
    make_console,
    make_table,
    number_text,
    print_fitting,
    print_json,
    progress_bar,
    short_text,
)
from .devices import memory_bytes

__all__ = ["grad", "library_sources"]

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

_BYTES = 256  # the vocabulary: a token is a byte
_SAMPLES = 256  # rows of each layer's attention whose error is measured


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
    tokens: Annotated[int, typer.Option(help="How many bytes of the text to read.", **POSITIVE)] = 16384,
    layers: Annotated[int | None, typer.Option(help="Layers.", show_default="4, or as in --params", **INTEGER)] = None,
    d_model: Annotated[
        int | None, typer.Option(help="Width of a token.", show_default="64, or as in --params", **INTEGER)
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads.", show_default="4, or as in --params", **INTEGER)] = None,
    d_ff: Annotated[
        int | None, typer.Option(help="Hidden units.", show_default="4 d-model, or as in --params", **INTEGER)
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
    with clean_exit():
        if threads is not None:
            set_num_threads(threads)
        if out is not None:
            _files.check_output("--out", out)
        if text == params == STDIN:
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

        with progress_bar("gradient") as progress:
            start = time.perf_counter()
            report = model.gradient_report(inputs, targets, samples=_SAMPLES, progress=progress)
            seconds = time.perf_counter() - start
        peak = _peak_memory()
        comparison = None if compare is None else _compare(model, inputs, targets, report, seconds)
        if out is not None:
            save(out, report.grads)
        if json_:
            print_json(_summary(report, tokens, seconds, peak, comparison))
        else:
            _print(report, tokens, seconds, peak, comparison)


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
        _check_length("the standard library", len(library_sources(size)), size)
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
        return np.frombuffer(library_sources(size), np.uint8)
    if path == STDIN:
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


def library_sources(size: int) -> bytes:
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
    with progress_bar("exact gradient") as progress:
        start = time.perf_counter()
        _, exact = reference.value_and_grad(inputs, targets, progress=progress)
        exact_seconds = time.perf_counter() - start
    errors = {name: timing.relative_error(report.grads[name], grad) for name, grad in exact.items()}
    return {"relative_error": errors, "speedup": exact_seconds / seconds}


def _engine_name(engine: Engine) -> str:
    return type(engine).__name__.lower()


def _head(head: HeadPlan) -> dict[str, Any]:
    errors = {name: head.errors[name].relative if name in head.errors else None for name in RESULTS}
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
    console = make_console()
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
    print_fitting(console, functools.partial(_table_of_heads, report))
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
            errors = (error_text(head.errors.get(name), ends=ends) for name in RESULTS)
            bound = "" if head.error_bound is None else number_text(head.error_bound)
            why = (short_text(head.missed or head.reason),) if planned else ()
            rows.append((str(i), str(j), head.engine_name, *errors, bound, *why))
    headers = ("layer", "head", "engine", *RESULTS, "bound", *(("why",) if planned else ()))
    title = "errors of each head" + (" (upper ends of 95% intervals)" if ends else "")
    return make_table(headers, rows, title, whole=ends)
