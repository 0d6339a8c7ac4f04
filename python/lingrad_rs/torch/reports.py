"""What each head chose within a tolerance, told to whoever asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import lingrad_rs as lg

from ..spec.engines import Auto
from ..spec.plan import HeadPlan

__all__ = ["Listener", "report", "reports"]

Listener = Callable[[tuple[HeadPlan, ...]], object]

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextlib.contextmanager
def reports(listener: Listener | None = None) -> Iterator[list[tuple[HeadPlan, ...]]]:
    """Tells what each head chose, for every call with a tolerance inside of the ``with`` block.

    Parameters
    ----------
    listener : callable, optional
        Called after each forward pass with the heads of that call (leading axes flattened), as ``vjp.heads`` of
        `lingrad_rs.attention_vjp` has them.

    Yields
    ------
    list of tuple of HeadPlan
        The same, one entry a call.

    Notes
    -----
    Cost: a second forward pass for each such call, as `lingrad_rs.attention` does not tell what it chose. In compiled
    code too, as long as it runs inside of the block. The threads of autograd, which run a checkpointed forward pass
    again, report nothing.

    Examples
    --------
    >>> with lgt.reports() as heads:  # doctest: +SKIP
    ...     lgt.scaled_dot_product_attention(q, k, v, tol=1e-2)
    >>> [head.engine_name for head in heads[0]]  # doctest: +SKIP
    """
    told: list[tuple[HeadPlan, ...]] = []

    def listen(heads: tuple[HeadPlan, ...]) -> None:
        told.append(heads)
        if listener is not None:
            listener(heads)

    token = _listeners.set((*_listeners.get(), listen))
    try:
        yield told
    finally:
        _listeners.reset(token)


def report(arrays: tuple[Any, Any, Any], options: dict[str, Any]) -> None:
    """Tell listeners what this call chose; without one, nothing is done."""
    listeners = _listeners.get()
    if listeners and isinstance(options["engine"], Auto):
        _, vjp = lg.attention_vjp(*arrays, **options)
        for listen in listeners:
            listen(vjp.heads)
