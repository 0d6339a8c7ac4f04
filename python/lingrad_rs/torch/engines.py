"""Engines as text, which is what an operator of PyTorch can take."""

from __future__ import annotations

import ast
import functools
from dataclasses import fields
from typing import Any

import torch

from .. import _check
from ..errors import ArgumentError
from ..spec.engines import Auto, Engine, LandmarkConstants, check_engine, engine_of

__all__ = ["EXACT", "engine_from_text", "text_of_engine"]

EXACT = "{'kind': 'Exact'}"
"""The text of the exact engine."""


def text_of_engine(engine: Engine | None, tol: float | None) -> str:
    """The text of what ``engine=`` and ``tol=`` mean together: `Exact` where neither is given."""
    if tol is not None:
        if engine is not None:
            raise ArgumentError(
                f"tol is {_check.shown(tol)} and engine is {_check.shown(engine)}; expected one of them: a tolerance "
                "chooses"
            )
        engine = Auto(tol)
    if engine is None:
        return EXACT
    # A compiler would trace into the cache, and warn of it.
    return _text(check_engine(engine)) if torch.compiler.is_compiling() else _cached_text(check_engine(engine))


@functools.lru_cache(maxsize=256)
def engine_from_text(text: str) -> Engine:
    """The engine that `text_of_engine` had."""
    description = ast.literal_eval(text)
    if description["kind"] == "Auto":
        del description["kind"]
        return Auto(**description)
    return engine_of(description)


def _text(engine: Engine) -> str:
    # As Python writes it, and joined by hand: PyTorch's compiler follows that, but neither json nor dataclasses.fields.
    options = [f", {name!r}: {_written(getattr(engine, name))}" for name in type(engine).__match_args__]
    return f"{{'kind': {type(engine).__name__!r}" + "".join(options) + "}"


def _written(value: Any) -> str:
    if not isinstance(value, LandmarkConstants):
        return f"{value!r}"
    numbers = {f.name: getattr(value, f.name) for f in fields(value)}
    return repr({name: x if isinstance(x, float) else x.tolist() for name, x in numbers.items()})


# Constants of landmarks are many numbers, so that writing them takes longer than a small call.
_cached_text = functools.lru_cache(maxsize=256)(_text)
