from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from .spec.engines import Engine
from .spec.plan import PlanData
from .spec.scores import Scores

__all__ = [
    "DEGREES",
    "LANDMARK_REMEDY",
    "LARGEST_BIAS",
    "LARGEST_BOUND",
    "LARGEST_STATE",
    "LEAST_OF_FLOOR",
    "NO_KEY_REMEDY",
    "PREFIX",
    "RANKS",
    "WINDOW",
    "AttentionState",
    "HeadPlanner",
    "TransformerTrace",
    "__version__",
    "activation_backward",
    "activation_forward",
    "attention_backward",
    "attention_backward_again",
    "attention_forward",
    "check_engine",
    "draw_rows",
    "embedding_backward",
    "embedding_forward",
    "estimate_error",
    "feed_forward_backward",
    "feed_forward_forward",
    "fitted_coefficients",
    "get_num_threads",
    "landmark_constants",
    "largest_relative_error",
    "linear_backward",
    "linear_forward",
    "measure_error",
    "norm_backward",
    "norm_forward",
    "random_dout",
    "rows_to_plan",
    "rows_to_verify",
    "self_attention_backward",
    "self_attention_forward",
    "set_num_threads",
    "set_rates",
    "simd_level",
    "stratified",
    "transformer_backward",
    "transformer_forward",
    "transformer_param_shapes",
    "transformer_value_and_grad",
    "unseen_row_sums",
]

__version__: str
DEGREES: int
LANDMARK_REMEDY: str
LARGEST_BIAS: float
LARGEST_BOUND: float
LARGEST_STATE: int
LEAST_OF_FLOOR: float
NO_KEY_REMEDY: str
PREFIX: int
RANKS: list[int]
WINDOW: int

_Array = NDArray[Any]
_Tokens = NDArray[np.uint32]
_Estimate = tuple[float, float, float, int]
_Rows = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Sums = tuple[_Floats, float, float]

@final
class HeadPlanner:
    def __new__(
        cls,
        *,
        tol: float,
        gradients: bool,
        strict_causal: bool,
        seed: int,
        causal: bool,
        scale: float,
        head: int,
        exact: float,
        polynomials: Sequence[float],
        landmarks: Sequence[float],
        drawing: Sequence[float],
        moments: Sequence[float],
    ) -> HeadPlanner: ...
    def degrees(self) -> int: ...
    def ranks(self) -> list[int]: ...
    def shift(self, queries: _Sums, keys: _Sums) -> list[list[float]] | None: ...
    def scores_are_too_large(self) -> None: ...
    def look_at_tokens(
        self, q: _Array, k: _Array, key_bias: _Array | None, positions: tuple[_Rows, _Rows] | None, values: _Sums
    ) -> list[list[float] | None]: ...
    def try_polynomials(
        self,
        moments: _Floats,
        weights: _Floats,
        total: int,
        dout: _Floats | None,
        *,
        d: int,
        d_v: int,
        natural: float,
        epsilon: float,
        coefficients: Sequence[list[float] | None],
    ) -> None: ...
    def look_for_landmarks(self, q: _Array, k: _Array, v: _Array, key_bias: _Array | None) -> None: ...
    def report(self) -> dict[str, Any]: ...

class _AttentionOptions(Protocol):
    n_heads: int
    n_kv_heads: int
    rope: bool
    score_bound: float | None
    causal: bool
    scale: float | None
    engine: Engine

class _Config(Protocol):
    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int | None: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def causal(self) -> bool: ...
    @property
    def norm(self) -> str: ...
    @property
    def activation(self) -> str: ...
    @property
    def rope(self) -> bool: ...
    @property
    def score_bound(self) -> float | None: ...
    @property
    def engine(self) -> Engine: ...

@final
class AttentionState:
    def reports(self) -> list[dict[str, Any]]: ...

@final
class TransformerTrace: ...

def attention_forward(
    q: _Array, k: _Array, v: _Array, scores: Scores, *, engine: Engine | PlanData, keep: bool, wants_lse: bool
) -> tuple[_Array, _Array | None, AttentionState | None]: ...
def check_engine(engine: Engine | PlanData, scores: Scores, itemsize: int) -> None: ...
def attention_backward(
    q: _Array, k: _Array, v: _Array, scores: Scores, state: AttentionState, dout: _Array, *, samples: int
) -> tuple[list[_Array | None], list[dict[str, Any]]]: ...
def attention_backward_again(
    dout: _Array,
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    lse: _Array,
    scores: Scores,
    *,
    engine: Engine,
    check_finite: bool,
) -> tuple[list[_Array | None], list[dict[str, Any]]]: ...
def measure_error(
    q: _Array, k: _Array, v: _Array, scores: Scores, out: _Array, *, samples: int, seed: int
) -> _Estimate: ...
def draw_rows(guides: _Floats, samples: int, seed: int) -> tuple[_Rows, _Floats]: ...
def rows_to_verify(n: int) -> int: ...
def unseen_row_sums(
    scores: _Floats, upstream: _Floats, weights: _Floats, exact: _Floats, own: _Floats, squares: _Floats
) -> _Floats: ...
def estimate_error(squares: _Floats, weights: _Floats, total: int, given: float | None = None) -> _Estimate: ...
def stratified(n: int, count: int, seed: int) -> _Rows: ...
def fitted_coefficients(
    q: _Array,
    k: _Array,
    key_bias: _Array | None,
    *,
    degree: int,
    query_shift: Sequence[float],
    key_shift: Sequence[float],
    causal: bool,
    scale: float,
    head: int = 0,
) -> list[float]: ...
def landmark_constants(
    q: _Array,
    k: _Array,
    v: _Array,
    key_bias: _Array | None,
    *,
    rank: int,
    seed: int,
    causal: bool,
    scale: float,
    head: int = 0,
) -> dict[str, Any]: ...
def rows_to_plan(n: int) -> int: ...
def random_dout(rows: int, d_v: int, seed: int) -> _Floats: ...
def set_rates(itemsize: int, flops: float, exps: float) -> None: ...
def largest_relative_error(coefficients: Sequence[float], r: float) -> float: ...
def linear_forward(x: _Array, w: _Array, b: _Array | None) -> _Array: ...
def linear_backward(x: _Array, w: _Array, has_bias: bool, dy: _Array) -> tuple[_Array, _Array, _Array | None]: ...
def activation_forward(x: _Array, kind: str) -> _Array: ...
def activation_backward(x: _Array, kind: str, dy: _Array) -> _Array: ...
def norm_forward(x: _Array, gain: _Array, bias: _Array | None, eps: float) -> _Array: ...
def norm_backward(
    x: _Array, gain: _Array, has_bias: bool, eps: float, dy: _Array
) -> tuple[_Array, _Array, _Array | None]: ...
def feed_forward_forward(x: _Array, w_in: _Array, w_out: _Array, kind: str) -> _Array: ...
def feed_forward_backward(
    x: _Array, w_in: _Array, w_out: _Array, kind: str, dy: _Array
) -> tuple[_Array, _Array, _Array]: ...
def embedding_forward(tokens: _Tokens, embed: _Array) -> _Array: ...
def embedding_backward(tokens: _Tokens, vocab: int, dy: _Array) -> _Array: ...
def self_attention_forward(x: _Array, weights: Sequence[_Array], options: _AttentionOptions) -> _Array: ...
def self_attention_backward(
    x: _Array, weights: Sequence[_Array], options: _AttentionOptions, dy: _Array
) -> tuple[_Array, dict[str, _Array]]: ...
def transformer_param_shapes(config: _Config) -> list[tuple[str, list[int]]]: ...
def transformer_forward(
    config: _Config, params: Sequence[tuple[str, _Array]], input: _Array
) -> tuple[_Array, TransformerTrace]: ...
def transformer_backward(
    config: _Config, params: Sequence[tuple[str, _Array]], input: _Array, trace: TransformerTrace, dy: _Array
) -> tuple[_Array, dict[str, _Array]]: ...
def transformer_value_and_grad(
    config: _Config,
    params: Sequence[tuple[str, _Array]],
    tokens: _Tokens,
    targets: _Tokens,
    *,
    samples: int,
    progress: Callable[[float], object] | None,
) -> tuple[float, dict[str, _Array], list[tuple[_Estimate | None, list[dict[str, Any]]]]]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def simd_level() -> str: ...
