"""What a mask of Hugging Face's models says, as structure: causal, a window, padding, segments; not n x m bools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Structure", "structure_of"]

# The module whose functions are understood, and the names of what it returns.
_MODULE = "transformers.masking_utils"
_OVERLAYS = {
    "sliding_window_overlay.<locals>.inner_mask": lambda values: _Rule(left=values["sliding_window"] - 1),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": lambda values: _Rule(
        left=values["sliding_window"], right=values["sliding_window"]
    ),
    "chunked_overlay.<locals>.inner_mask": lambda values: _Rule(chunks=(values["chunk_size"], values["left_padding"])),
    "packed_sequence_mask_function.<locals>.inner_mask": lambda values: _Rule(segments=values["packed_sequence_mask"]),
    "causal_mask_function": lambda values: _Rule(right=0),
    "bidirectional_mask_function": lambda values: _Rule(),
}
# Rows of a mask that are held against its structure, at every place where it changes.
_CHECKED_ROWS = 16


@dataclass(frozen=True)
class _Rule:
    """Query i sees key j where ``i - left <= j <= i + right``, and of its own segment alone."""

    left: int | None = None
    right: int | None = None
    segments: Tensor | None = None  # (batch, n), nondecreasing
    # Segments of one length, which begin after so many tokens of padding in each batch.
    chunks: tuple[int, Tensor] | None = None
    # Whether positions count from the start of a segment: the same only where segments are apart.
    in_segments: bool = False

    def __and__(self, other: _Rule) -> _Rule | None:
        cuts = (self.segments, self.chunks, other.segments, other.chunks)
        if sum(x is not None for x in cuts) > 1:
            return None
        return _Rule(
            left=_least(self.left, other.left),
            right=_least(self.right, other.right),
            segments=other.segments if self.segments is None else self.segments,
            chunks=self.chunks or other.chunks,
            in_segments=self.in_segments or other.in_segments,
        )


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


@dataclass(frozen=True, eq=False)
class Structure:
    """A mask of ``(batch, 1, n, m)`` bools by what makes it; wherever a tensor is needed, it becomes that.

    Attributes
    ----------
    options : dict
        ``causal``, ``query_offset``, ``window``, ``key_bias`` and ``segment_ids``, as for `lingrad_rs.torch.attention`.
    dense : callable
        Makes the bools.
    shape : torch.Size
        Of the bools, ``(batch, 1, n, m)``.
    """

    options: dict[str, Any]
    dense: Callable[[], Tensor]
    shape: torch.Size

    @property
    def ndim(self) -> int:
        """4; asked for before a mask is made, so that it is told without one."""
        return len(self.shape)

    def __getattr__(self, name: str) -> Any:
        # Some models look into their masks.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def densified(x: Any) -> Any:
            if isinstance(x, Structure):
                return x.dense()
            return type(x)(densified(y) for y in x) if type(x) in (list, tuple) else x

        return func(*densified(tuple(args)), **{name: densified(x) for name, x in (kwargs or {}).items()})


def structure_of(
    mask_function: Callable[..., Any],
    *,
    batch: int,
    n: int,
    m: int,
    offset: int,
    padding: Tensor | None,
    dense: Callable[[], Tensor],
    positions: tuple[int, int],
) -> Structure | None:
    """The structure of a mask, where it is known for certain; None where it must be computed pair by pair.

    Parameters
    ----------
    mask_function : callable
        Hugging Face's: of the numbers of batch, head, query and key.
    batch, n, m, offset : int
        Sizes, and the position of query 0 counted from key 0.
    padding : Tensor of bool, shape (batch, m), optional
        True may be attended to.
    dense : callable
        Makes the mask as a tensor.
    positions : pair of int
        The positions of query 0 and key 0 that the function counts with.

    Notes
    -----
    The function is recognised by what it was made of, and then held against the structure in 16 rows, around each place
    where a row begins or ends to see keys: a later release may give an old name a new meaning.
    Cost: O(batch n) time.
    """
    rule = _rule_of(mask_function)
    if rule is None or (rule.in_segments and rule.segments is None) or not -n <= offset <= m:
        return None
    if rule.chunks is not None:
        if rule.in_segments:
            return None
        size, left = rule.chunks
        tokens = torch.arange(n, device=left.device) + positions[0]
        rule = replace(rule, segments=(tokens - left[:, None]).div(size, rounding_mode="floor"), chunks=None)
    if rule.segments is not None and (rule.segments.shape != (batch, n) or n != m or offset != 0):
        return None
    if not _agrees(mask_function, rule, batch, n, m, offset, positions):
        return None
    # What cuts nothing is left out: fewer options suit more engines.
    if rule.segments is not None and bool((rule.segments == rule.segments[:, :1]).all()):
        rule = replace(rule, segments=None)
    left = None if rule.left is None or offset + n - 1 - rule.left <= 0 else rule.left
    right = None if rule.right is None or offset + rule.right >= m - 1 else rule.right
    options: dict[str, Any] = {"causal": right == 0}
    if left is not None or right is not None:
        options["query_offset"] = offset
    if left is not None or right not in (None, 0):
        options["window"] = (left, None if right == 0 else right)
    if padding is not None:
        options["key_bias"] = padding.unsqueeze(1)
    if rule.segments is not None:
        options["segment_ids"] = rule.segments
    return Structure(options, dense, torch.Size((batch, 1, n, m)))


def _rule_of(function: Any) -> _Rule | None:
    if getattr(function, "__module__", None) != _MODULE or not hasattr(function, "__code__"):
        return None
    name = function.__qualname__
    cells = function.__closure__ or ()
    values = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    try:
        if name == "and_masks.<locals>.and_mask":
            rule: _Rule | None = _Rule()
            for part in values["mask_functions"]:
                other = _rule_of(part)
                rule = None if rule is None or other is None else rule & other
            return rule
        if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
            inner = _rule_of(values["mask_function"])
            return None if inner is None else replace(inner, in_segments=True)
        return _OVERLAYS[name](values) if name in _OVERLAYS else None
    except (KeyError, TypeError):
        return None


def _agrees(
    function: Callable[..., Any], rule: _Rule, batch: int, n: int, m: int, offset: int, positions: tuple[int, int]
) -> bool:
    """Whether function and rule say the same of some rows, around each edge of what they see."""
    if batch == 0 or n == 0 or m == 0:
        return True
    rows = sorted({i * (n - 1) // max(_CHECKED_ROWS - 1, 1) for i in range(_CHECKED_ROWS)})
    edges = [0] if rule.left is None else [0, -rule.left]
    edges += [rule.right] if rule.right else []
    pairs = {(i, min(max(i + offset + edge + step, 0), m - 1)) for i in rows for edge in edges for step in (-1, 0, 1)}
    pairs |= {(i, j) for i in rows for j in (0, m // 2, m - 1)}
    i, j = torch.tensor(sorted(pairs)).T
    sees = torch.ones(i.shape, dtype=torch.bool)
    if rule.left is not None:
        sees &= j >= i + offset - rule.left
    if rule.right is not None:
        sees &= j <= i + offset + rule.right
    b = torch.arange(i.numel()) % batch
    if rule.segments is not None:
        segments = rule.segments.cpu()
        sees = sees & (segments[b, i] == segments[b, j])
    device = rule.segments.device if rule.segments is not None else None
    said = function(*(x.to(device) for x in (b, torch.zeros_like(b), i + positions[0], j + positions[1])))
    return bool((said.cpu() == sees).all())
