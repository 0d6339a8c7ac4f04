"""``lingrad bench``: times of the engines over the number of tokens."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Annotated

import typer
from rich.table import Table

from ..backends import select
from ..errors import ArgumentError
from ..threads import set_num_threads
from . import timing
from .app import (
    POSITIVE,
    FloatName,
    JsonOption,
    PlotOption,
    ThreadsOption,
    app,
    clean_exit,
    make_console,
    print_json,
    progress_bar,
)
from .devices import HOST, Device, Gpu

__all__ = ["bench"]


class DeviceName(str, Enum):
    """The devices by name."""

    cpu = "cpu"
    gpu = "gpu"


@app.command()
def bench(
    d: Annotated[int, typer.Option("--d", help="Width of a head.", **POSITIVE)] = 16,
    heads: Annotated[int, typer.Option(help="Heads.", **POSITIVE)] = 1,
    tokens: Annotated[int, typer.Option(help="The greatest length; the others are halves of it.", **POSITIVE)] = 65536,
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
    with clean_exit():
        if threads is not None:
            if device is DeviceName.gpu:
                raise ArgumentError("--threads needs --device cpu; got gpu")
            set_num_threads(threads)
        if plot is not None:
            timing.check_plot(plot)
        where: Device = HOST if device is DeviceName.cpu else Gpu(select.cupy())
        methods = timing.engines(degree or [2], d)
        peer = timing.torch_sdpa(where)
        methods += [] if peer is None else [peer]
        sizes = [tokens >> halved for halved in range(8) if halved == 0 or tokens >> halved >= 1024][::-1]
        total = sum(sizes)
        notes: list[str] = []
        with progress_bar("bench") as progress:
            rows = timing.scaling(
                methods,
                sizes,
                timing.Case(tokens, d, heads, causal),
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
        machine = timing.machine(where)
        title = (
            f"{'causal' if causal else 'full'} attention, d = {d}, {heads} heads, {dtype.value}, score std {score_std}"
        )
        if plot is not None:
            timing.plot(rows, plot, f"{title}\n{machine}")
        if json_:
            print_json({"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]})
        else:
            _print_bench(rows, machine, title, limit)
            if peer is None:
                make_console().print(f"{where.torch} is not installed; with it, its fused kernel takes part.")


def _print_bench(rows: list[timing.Row], machine: str, title: str, limit: float) -> None:
    console = make_console()
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
