"""Of a test with many options, the cases that hold every pair of options, in place of every combination.

Most faults show with one option, or with two together. A case is kept while it has a pair that none before it had.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

__all__ = ["cover"]

Case = tuple[int, ...]


def _pairs(case: Case) -> Iterator[tuple[int, int, int, int]]:
    for i, j in combinations(range(len(case)), 2):
        yield i, j, case[i], case[j]


def cover(cases: Sequence[Case]) -> list[int]:
    """The numbers of some cases, in order: every pair of options that is in one of the cases is in one of these.

    Greedy: the next is the first of those that hold most of the pairs that are missing. A case with fewer than two
    options has no pairs; all of them are taken.
    """
    if any(len(case) < 2 for case in cases):
        return list(range(len(cases)))
    pairs = [frozenset(_pairs(case)) for case in cases]
    missing = frozenset().union(*pairs)
    gains = {i: len(held) for i, held in enumerate(pairs)}
    taken = []
    while missing:
        # What a case would add only falls, so that one that still has the most is the best.
        while True:
            best = max(gains, key=lambda i: (gains[i], -i))
            gain = len(pairs[best] & missing)
            if gain == gains[best]:
                break
            gains[best] = gain
        taken.append(best)
        missing -= pairs[best]
        del gains[best]
    return sorted(taken)
