"""The command ``lingrad``.

It computes the gradient of every weight of a small transformer on a long text, times engines, and tells which of them
fit heads of one's own.
"""

from __future__ import annotations

import os
import signal
import sys

from .app import app
from .bench import bench
from .grad import grad
from .plan import plan

__all__ = ["bench", "grad", "main", "plan"]


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
        print(f"lingrad: standard output: {error.strerror}", file=sys.stderr)
        sys.exit(2)
