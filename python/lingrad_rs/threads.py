"""How many threads the library computes with, and what it was built for."""

from __future__ import annotations

from . import _check, _lingrad_rs

__all__ = ["build_info", "get_num_threads", "set_num_threads"]


def get_num_threads() -> int:
    """The number of threads of the next call: as set, else ``RAYON_NUM_THREADS``, else the machine's."""
    return _lingrad_rs.get_num_threads()


def set_num_threads(n: int) -> None:
    """Set the number of threads of later calls. Results do not depend on it, to the last bit.

    Parameters
    ----------
    n : int
        At least 1; `ArgumentError` otherwise.
    """
    _lingrad_rs.set_num_threads(_check.integer("n", n, 1))


def build_info() -> dict[str, str | int]:
    """The version, the SIMD level in use ("avx512", "avx2", "neon" or "scalar"), and the number of threads.

    Returns
    -------
    dict
        With the keys ``version``, ``simd`` and ``threads``.
    """
    return {
        "version": _lingrad_rs.__version__,
        "simd": _lingrad_rs.simd_level(),
        "threads": _lingrad_rs.get_num_threads(),
    }
