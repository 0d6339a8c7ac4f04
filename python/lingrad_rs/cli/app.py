"""What the commands share: the application, options, errors that end it, and how numbers and tables are printed."""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

from .. import __version__
from ..errors import LingradError
from ..spec.plan import ErrorEstimate

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as missing:
    sys.exit(f"lingrad needs {missing.name}: pip install 'lingrad_rs[cli]'")

__all__ = [
    "INTEGER",
    "POSITIVE",
    "RESULTS",
    "STDIN",
    "FloatName",
    "JsonOption",
    "PlotOption",
    "ThreadsOption",
    "app",
    "clean_exit",
    "error_text",
    "make_console",
    "make_table",
    "number_text",
    "print_fitting",
    "print_json",
    "progress_bar",
    "short_text",
]

RESULTS = ("out", "dq", "dk", "dv")
STDIN = Path("-")
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


INTEGER: dict[str, Any] = {"parser": _whole_number, "metavar": "INTEGER"}
POSITIVE: dict[str, Any] = {"parser": _positive_number, "metavar": "INTEGER"}
# Options that several commands have.
PlotOption = Annotated[Path | None, typer.Option(help="Draw it there (.png or .svg).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads.", show_default="RAYON_NUM_THREADS, or the machine's")
]


class FloatName(str, Enum):
    """The dtypes by name."""

    float32 = "float32"
    float64 = "float64"


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


@contextmanager
def clean_exit() -> Iterator[None]:
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


def print_json(value: object) -> None:
    """As one line; null in place of NaN and infinity, which JSON does not have."""

    def finite(x: object) -> object:
        if isinstance(x, Mapping):
            return {name: finite(part) for name, part in x.items()}
        if isinstance(x, list | tuple):
            return [finite(part) for part in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    typer.echo(json.dumps(finite(value), allow_nan=False))


def make_console() -> Console:
    """Where results are printed: as wide as the terminal, and 120 columns where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[float], None]]:
    """A bar that takes the part that is done; nothing is drawn where there is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


def make_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, *, whole: bool
) -> Table:
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


def print_fitting(console: Console, table: Callable[..., Table]) -> None:
    """The table with the ends of intervals where there is room for them, else without."""
    full = table(ends=True)
    wide = console.options.update(width=10 * console.width)
    console.print(full if console.measure(full, options=wide).minimum <= console.width else table(ends=False))


def number_text(x: float) -> str:
    """Two digits and an exponent, with no zeros in front of it."""
    return re.sub(r"e([+-])0*(?=\d)", lambda match: "e" + match[1].replace("+", ""), f"{x:.1e}")


def error_text(error: ErrorEstimate | None, *, ends: bool) -> str:
    """An estimate, with ``ends`` the upper end of its interval too."""
    if error is None:
        return ""
    return number_text(error.relative) + (f" ({number_text(error.high)})" if ends else "")


def short_text(text: str, width: int = 56) -> str:
    """The first words of a text, as they are, with no markup."""
    return escape(textwrap.shorten(text, width, placeholder=" …"))
