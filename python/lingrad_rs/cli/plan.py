"""``lingrad plan``: what engines cost and miss on heads of one's own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..threads import set_num_threads
from . import surveys, timing
from .app import (
    POSITIVE,
    RESULTS,
    STDIN,
    JsonOption,
    PlotOption,
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

__all__ = ["plan"]


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
    max_tokens: Annotated[int | None, typer.Option(help="Only so many tokens.", show_default="all", **POSITIVE)] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 3,
    threads: ThreadsOption = None,
    plot: PlotOption = None,
    json_: JsonOption = False,
) -> None:
    """Tell what every engine costs and misses on heads of your own, and what is chosen within tolerances.

    Errors are measured on sampled rows and keys that are computed exactly. Engines take turns within every round.
    """
    with clean_exit():
        if threads is not None:
            set_num_threads(threads)
        if plot is not None:
            timing.check_plot(plot)
        task = surveys.Task(causal, scale, gradients)
        tolerances = sorted(set(tol or [1e-1, 1e-2, 1e-3]), reverse=True)
        picked = surveys.heads(surveys.read(file, task, max_tokens), layer or [], head or [])
        told: list[surveys.Survey] = []
        with progress_bar("plan") as progress:
            for i, one in enumerate(picked):
                told.append(
                    surveys.survey(
                        one,
                        task,
                        tolerances,
                        rounds=rounds,
                        progress=lambda done, i=i: progress((i + done) / len(picked)),
                    )
                )
        first = told[0]
        title = (
            f"{'causal' if causal else 'full'} attention{', with gradients' if gradients else ', forward alone'}, "
            f"{first.tokens:,} tokens, d = {first.d}, {first.dtype}"
        )
        if plot is not None:
            surveys.plot(told, plot, f"{'standard input' if file == STDIN else file.name}: {title}\n{timing.machine()}")
        if json_:
            print_json(
                {
                    "machine": timing.machine(),
                    "causal": causal,
                    "gradients": gradients,
                    "heads": [dataclasses.asdict(survey) for survey in told],
                }
            )
        else:
            _print_surveys(told, title, gradients)


def _print_surveys(told: Sequence[surveys.Survey], title: str, gradients: bool) -> None:
    console = make_console()
    console.print(timing.machine())
    console.print(title)
    for survey in told:
        s = survey.scores
        console.print(
            f"\nLayer {survey.layer}, head {survey.head}: scores of standard deviation {s.std:.2g}, the largest "
            f"{s.largest:.2g} in size; with means subtracted {s.centred_std:.2g} and {s.centred_largest:.2g}."
        )
        print_fitting(console, functools.partial(_table_of_trials, survey, gradients))
        for trial in survey.trials:
            if trial.failure is not None:
                console.print(f"{trial.engine} fails: {short_text(trial.failure, 90)}")
        if survey.left_out:
            console.print(f"Left out, with more features than keys: {', '.join(survey.left_out)}.")
        console.print(_table_of_choices(survey))
    console.print(
        "Medians of times. Errors are relative, of sampled rows, in parentheses the upper ends of 95% intervals; "
        "within: the least tolerance that all these upper ends are within."
    )


def _table_of_trials(survey: surveys.Survey, gradients: bool, *, ends: bool) -> Table:
    results = RESULTS if gradients else ("out",)
    rows = []
    for trial in survey.trials:
        if trial.seconds is None or trial.relative_time is None:
            rows.append((trial.engine, "fails", *[""] * (len(results) + 2)))
            continue
        times = (f"{1e3 * trial.seconds:.2f}", f"{trial.relative_time:.2f}")
        errors = (error_text(trial.errors.get(x), ends=ends) for x in results)
        rows.append((trial.engine, *times, *errors, f"{min(trial.meets):g}" if trial.meets else ""))
    return make_table(("engine", "ms", "of exact", *results, "within"), rows, whole=ends)


def _table_of_choices(survey: surveys.Survey) -> Table:
    rows = []
    for choice in survey.choices:
        predicted = "" if choice.predicted_error is None else number_text(choice.predicted_error)
        measured = error_text(surveys.worst(choice.errors.values()), ends=True)
        why = short_text(choice.missed or choice.reason, 100)
        rows.append((f"{choice.tol:g}", choice.engine, predicted, measured, f"{choice.cost:.2f}", why))
    return make_table(("tolerance", "choice", "predicted", "worst measured", "cost of exact", "why"), rows, whole=False)
