"""Engines as text, which is what an operator of PyTorch can take."""

from __future__ import annotations

import functools
import json

from .. import _check
from ..errors import ArgumentError
from ..spec.engines import Auto, Engine, Exact, check_engine, described, engine_of

__all__ = ["EXACT", "engine_from_text", "text_of_engine"]


def text_of_engine(engine: Engine | None, tol: float | None) -> str:
    """The text of what ``engine=`` and ``tol=`` mean together: `Exact` where neither is given."""
    if tol is not None:
        if engine is not None:
            raise ArgumentError(
                f"tol is {_check.shown(tol)} and engine is {_check.shown(engine)}; expected one of them: a tolerance "
                "chooses"
            )
        engine = Auto(tol)
    return EXACT if engine is None else _text(check_engine(engine))


@functools.lru_cache(maxsize=256)
def engine_from_text(text: str) -> Engine:
    """The engine that `text_of_engine` had."""
    description = json.loads(text)
    if description["kind"] == "Auto":
        del description["kind"]
        return Auto(**description)
    return engine_of(description)


# Constants of landmarks are many numbers, so that writing them takes longer than a small call.
@functools.lru_cache(maxsize=256)
def _text(engine: Engine) -> str:
    return json.dumps(described(engine))  # type: ignore[arg-type]  # it takes any dataclass of numbers


EXACT = _text(Exact())
"""The text of the exact engine."""
