from collections.abc import Sequence
from typing import Any, Protocol, final

from numpy.typing import NDArray

__all__: list[str]
__version__: str

class _Polynomial(Protocol):
    @property
    def degree(self) -> int: ...
    @property
    def coefficients(self) -> str | Sequence[float] | NDArray[Any]: ...
    @property
    def gradient(self) -> str: ...
    @property
    def shift(self) -> str: ...
    @property
    def diagonal(self) -> str: ...
    @property
    def window(self) -> int: ...

@final
class AttentionState: ...

def attention_forward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    key_bias: NDArray[Any] | None,
    *,
    polynomial: _Polynomial | None,
    causal: bool,
    scale: float,
    keep: bool,
) -> tuple[NDArray[Any], AttentionState | None]: ...
def attention_backward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    key_bias: NDArray[Any] | None,
    state: AttentionState,
    dout: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any] | None]: ...
def measure_error(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    key_bias: NDArray[Any] | None,
    out: NDArray[Any],
    *,
    causal: bool,
    scale: float,
    samples: int,
    seed: int,
) -> tuple[float, float, float, int]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def simd_level() -> str: ...
