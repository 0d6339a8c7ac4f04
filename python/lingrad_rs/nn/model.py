"""A transformer, and the gradient of every one of its parameters.

``x = embed[tokens]``; each layer ``x += Attn(norm(x))``, ``x += FFN(norm(x))``; then ``logits = norm(x) @ head``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import _check, _files
from ..backends import select
from ..errors import ArgumentError, DeviceError, ShapeError
from ..spec.engines import Auto, Engine, Exact, Landmark, Polynomial, check_engine
from ..spec.plan import ErrorEstimate, HeadPlan, head_plans
from .modules import ACTIVATIONS

__all__ = ["GradientReport", "LayerReport", "Transformer", "TransformerConfig", "load", "save"]

Array = NDArray[Any]
_METADATA = "lingrad_rs.config"

# Far beyond any model; so that nothing grows without end before it is known to fit, be it names or sizes in bytes.
_MOST_LAYERS = 2**16
_MOST_PARAMETERS = 2**59


@dataclass(frozen=True)
class TransformerConfig:
    """What model to compute.

    Parameters
    ----------
    n_layers : int
        Layers, each of attention and a feed-forward block.
    d_model : int
        Width of a token.
    n_heads : int
        Query heads, a divisor of ``d_model``.
    d_ff : int
        Hidden units of a feed-forward block.
    vocab_size : int
        Different tokens.
    causal : bool
        Whether a token sees only itself and those before it.
    norm : {"rms", "layer"}
        RMSNorm with a gain, or LayerNorm with a gain and a bias, both with eps 1e-5.
    activation : {"relu", "silu", "gelu_tanh"}
        Of the feed-forward blocks: ``FFN(x) = act(x @ w_in) @ w_out``.
    rope : bool
        Whether queries and keys are turned by their positions, halves of a head as pairs, base 10000.
    score_bound : float, optional
        Queries and keys are normalised to length 1 and the scale is this number, so that no score exceeds it. Without
        it the scale is ``1/sqrt(d_model / n_heads)``.
    n_kv_heads : int, optional
        Key heads, a divisor of ``n_heads``; as many unless given.
    engine : Exact, Polynomial, Landmark or Auto
        How attention is computed.

    Raises
    ------
    ArgumentError
        A field has a value that it may not have, or fields do not fit together.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    vocab_size: int
    causal: bool = True
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["relu", "silu", "gelu_tanh"] = "silu"
    rope: bool = True
    score_bound: float | None = None
    n_kv_heads: int | None = None
    engine: Engine = Polynomial(degree=2)

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "d_ff", "vocab_size", "n_kv_heads"):
            value = getattr(self, name)
            if value is not None or name != "n_kv_heads":
                object.__setattr__(self, name, _check.integer(name, value, 1))
        for name in ("causal", "rope"):
            object.__setattr__(self, name, _check.flag(name, getattr(self, name)))
        _check.choice("norm", self.norm, ("rms", "layer"))
        _check.choice("activation", self.activation, ACTIVATIONS)
        if self.score_bound is not None:
            object.__setattr__(self, "score_bound", _check.positive("score_bound", self.score_bound))
        check_engine(self.engine)
        count = self.param_count()
        for what, number, most in (
            (f"n_layers is {self.n_layers}, of {count} parameters", self.n_layers, _MOST_LAYERS),
            (f"the parameters are {count} numbers", count, _MOST_PARAMETERS),
        ):
            if number > most:
                raise ArgumentError(f"{what}; expected at most {most}: in float32 they would take {4 * count} bytes")

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by name, in the model's order."""
        return self._shapes(self.n_layers)

    def param_count(self) -> int:
        """How many numbers all parameters are together."""
        one, two = (sum(map(math.prod, self._shapes(n).values())) for n in (1, 2))
        return one + (self.n_layers - 1) * (two - one)

    def _shapes(self, n_layers: int) -> dict[str, tuple[int, ...]]:
        config: Any = SimpleNamespace(**{f.name: getattr(self, f.name) for f in fields(self)} | {"n_layers": n_layers})
        return {name: tuple(shape) for name, shape in select.of().transformer_param_shapes(config)}


@dataclass(frozen=True)
class LayerReport:
    """What is known of a layer after a gradient.

    Attributes
    ----------
    engine : Exact, Polynomial, Landmark or Auto
        What computed its attention; with a tolerance, `heads` tell.
    measured_error : ErrorEstimate or None
        The error of its attention's output, from sampled rows computed exactly.
    grad_norm : float
        The Frobenius norm of the gradient with respect to all its parameters.
    heads : tuple of HeadPlan
        Each head of each sequence: its engine and the measured errors of out, dq, dk and dv.
    """

    engine: Engine
    measured_error: ErrorEstimate | None
    grad_norm: float
    heads: tuple[HeadPlan, ...] = ()


@dataclass(frozen=True, eq=False)
class GradientReport:
    """A loss, its gradients, and what is known of each layer.

    Two are equal where all their numbers are; having arrays, they cannot be hashed.
    """

    loss: float
    grads: dict[str, Array]
    layers: tuple[LayerReport, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GradientReport):
            return NotImplemented
        same = self.loss == other.loss and self.layers == other.layers and self.grads.keys() == other.grads.keys()
        return same and all(_same(x, other.grads[name]) for name, x in self.grads.items())

    __hash__ = None  # type: ignore[assignment]


def _same(x: Array, y: Array) -> bool:
    """Whether two arrays lie in the same place and hold the same numbers; they need not be the same memory."""
    if select.kind(x) != select.kind(y) or x.dtype != y.dtype or x.shape != y.shape:
        return False
    return getattr(x, "device", None) == getattr(y, "device", None) and select.of(x).same(x, y)


class Transformer:
    """A transformer language model.

    Parameters
    ----------
    config : TransformerConfig
        What model.
    params : mapping of str to ndarray, optional
        Its parameters, all float32 or all float64, NumPy's or CuPy's; see `TransformerConfig.param_shapes`. Arrays are
        taken as they are, not copied; a model computes where they are. Unless given, they are drawn by SmallInit, on
        the CPU: normal with standard deviation ``sqrt(2 / (5 d_model))``, those of ``w_o`` and ``w_out`` divided by
        ``sqrt(2 n_layers)``, gains 1 and biases 0. Scores start small, where low rank works.
    seed : int
        Of the draw.
    dtype : float32 or float64
        Of parameters that are drawn.

    Attributes
    ----------
    config : TransformerConfig
    params : dict of str to ndarray
        May be changed between calls; it is checked in each.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError, DeviceError
        Parameters that are missing, unknown, or do not fit.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: Mapping[str, Array] | None = None,
        *,
        seed: int = 0,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if not isinstance(config, TransformerConfig):
            raise ArgumentError(f"config is {_check.shown(config)}; expected a TransformerConfig")
        self.config = config
        if params is None:
            self.params = _small_init(config, _check.integer("seed", seed, 0), _float_dtype(dtype))
        elif isinstance(params, Mapping):
            self.params = dict(params)
        else:
            raise ArgumentError(f"params is a {type(params).__name__}; expected a dict of name to array")
        self._checked_params()

    def vjp(self, x: Array) -> tuple[Array, Callable[[Array], tuple[Array | None, dict[str, Array]]]]:
        """Logits, and the function that pulls a gradient with respect to them back.

        Parameters
        ----------
        x : ndarray
            Integer tokens ``(..., n)``, or embeddings ``(..., n, d_model)`` of the parameters' dtype.

        Returns
        -------
        y : ndarray, shape (..., n, vocab_size)
            The logits.
        pullback : callable
            ``pullback(dy)`` returns ``(dx, grads)``: the gradient with respect to the embeddings (None for tokens) and
            with respect to every parameter by name (that of ``embed`` is 0 for embeddings). It may be called many
            times; ``x`` and the parameters must not change before.

        Raises
        ------
        ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, DenominatorError
            ``x``, ``dy`` or a parameter does not fit; a row of the polynomial engine fails.

        Notes
        -----
        Time: that of the layers; the pullback computes the inside of each layer again. Memory kept: one
        ``(..., n, d_model)`` array a layer.
        """
        params = self._checked_params()
        array = _check.array("x", x)
        is_tokens = _check.is_integer(array)
        if is_tokens:
            array = _check.token_ids("tokens", array, self.config.vocab_size, params[0][1])
        else:
            _, array = _check.floats(params=params[0][1], x=array)
            _check.shape("x", array, ("...", "n", self.config.d_model), match=f"d_model = {self.config.d_model}")
        config, backend = self.config, select.of(array)
        y, trace = backend.transformer_forward(config, params, array)
        shape = y.shape

        def pullback(dy: Array) -> tuple[Array | None, dict[str, Array]]:
            _, checked = _check.floats(y=params[0][1], dy=dy)
            _check.shape("dy", checked, shape, match=f"y of shape {shape}")
            dx, grads = backend.transformer_backward(config, params, array, trace, checked)
            return (None if is_tokens else dx), grads

        return y, pullback

    def value_and_grad(
        self,
        tokens: Array,
        targets: Array | None = None,
        *,
        loss: Callable[[Array], tuple[float, Array]] | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """A loss, and its gradient with respect to every parameter.

        Parameters
        ----------
        tokens : ndarray of int, shape (..., n)
            What the model reads.
        targets : ndarray of int, shape (..., n)
            What it should predict; with ``loss`` they are not needed, nor read.
        loss : callable, optional
            ``loss(y)`` returns the value and its gradient with respect to the logits ``y (..., n, vocab_size)``. Unless
            given, the loss is the mean over tokens of the cross-entropy ``log sum_c exp(y_c) - y_target``, computed
            tile by tile without an ``n x vocab_size`` array.
        progress : callable, optional
            Called with the fraction done, about 20 times a second, with parameters on a GPU once a stage of a layer
            (not with ``loss``). An exception stops the computation.

        Returns
        -------
        value : float
        grads : dict of str to ndarray

        Raises
        ------
        ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, DenominatorError
            An argument or a parameter does not fit; a row of the polynomial engine fails.
        """
        if loss is None:
            report = self.gradient_report(tokens, targets, samples=0, progress=progress)
            return report.loss, report.grads
        if not callable(loss):
            raise ArgumentError(f"loss is {_check.shown(loss)}; expected a callable")
        tokens = _check.token_ids("tokens", tokens, self.config.vocab_size, self._checked_params()[0][1])
        y, pullback = self.vjp(tokens)
        result = loss(y)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentError(f"loss returned {type(result).__name__}; expected (value, dL_dy)")
        value, dy = result
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ArgumentError(f"loss returned the value {_check.shown(value)}; expected a number") from None
        return number, pullback(dy)[1]

    def gradient_report(
        self,
        tokens: Array,
        targets: Array | None,
        *,
        samples: int = 256,
        progress: Callable[[float], object] | None = None,
    ) -> GradientReport:
        """The mean cross-entropy and its gradients as `value_and_grad` computes them, with each layer's measured error.

        Parameters
        ----------
        tokens, targets, progress
            As for `value_and_grad`.
        samples : int
            Rows, spread over batch and heads, that are computed exactly to measure the error of a layer's attention; 0
            for none. Each head is measured on its own, too, on as many queries and keys, but no more than 64.

        Returns
        -------
        GradientReport

        Raises
        ------
        ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, DenominatorError
            As `value_and_grad`.
        """
        params = self._checked_params()
        samples = _check.integer("samples", samples, 0)
        ids = _check.token_ids("tokens", tokens, self.config.vocab_size, params[0][1])
        if targets is None:
            raise ArgumentError("targets is missing; expected integers like tokens, or loss=")
        wanted = _check.token_ids("targets", targets, self.config.vocab_size, params[0][1])
        _check.shape("targets", wanted, ids.shape, match=f"tokens of shape {ids.shape}")
        if ids.size == 0:
            raise ShapeError(f"tokens has shape {ids.shape}; expected at least one token to take a mean over")
        if progress is not None and not callable(progress):
            raise ArgumentError(f"progress is {_check.shown(progress)}; expected a callable")
        backend = select.of(ids)
        loss, grads, reports = backend.transformer_value_and_grad(
            self.config, params, ids, wanted, samples=samples, progress=progress
        )
        layers = []
        for i, (error, heads) in enumerate(reports):
            own = [grad for name, grad in grads.items() if name.startswith(f"layers.{i}.")]
            estimate = None if error is None else ErrorEstimate(*error)
            norm = backend.frobenius_norm(own)
            layers.append(LayerReport(self.config.engine, estimate, norm, head_plans(heads)))
        return GradientReport(loss, grads, tuple(layers))

    def _checked_params(self) -> list[tuple[str, Array]]:
        shapes = self.config.param_shapes()
        for name in self.params:
            if name not in shapes:
                raise ArgumentError(f"params holds {_check.shown(name)}, which the model does not have")
        for name in shapes:
            if name not in self.params:
                raise ArgumentError(f"params lacks {name!r}; expected an array of shape {shapes[name]}")
        arrays = _check.floats(**{name: self.params[name] for name in shapes})
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            _check.shape(name, array, shape, match="the config")
        return list(zip(shapes, arrays, strict=True))


def _float_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    for known in (np.dtype(np.float32), np.dtype(np.float64)):
        try:
            if np.dtype(dtype) == known and dtype is not None:
                return known
        except Exception:  # of whatever kind NumPy, or the class of what it is asked of, raises
            break
    raise ArgumentError(f"dtype is {_check.shown(dtype)}; expected float32 or float64")


def _small_init(config: TransformerConfig, seed: int, dtype: np.dtype[Any]) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    params: dict[str, Array] = {}
    for name, shape in config.param_shapes().items():
        if name.endswith(".gain"):
            params[name] = np.ones(shape, dtype)
        elif name.endswith(".bias"):
            params[name] = np.zeros(shape, dtype)
        else:
            std = np.sqrt(2 / (5 * config.d_model))
            if name.endswith((".w_o", ".w_out")):
                std /= np.sqrt(2 * config.n_layers)
            params[name] = (std * rng.standard_normal(shape)).astype(dtype)
    return params


def save(path: str | os.PathLike[str], model_or_params: Transformer | Mapping[str, Array]) -> None:
    """Write a model, or arrays by name, to a safetensors file.

    The file is written under another name in the same folder and then renamed, so that there is never half of one.

    Parameters
    ----------
    path : path
        Where; a file there is replaced.
    model_or_params : Transformer or mapping of str to ndarray
        A model's configuration goes into the file's metadata. Arrays of any shape, and NumPy's numbers.

    Raises
    ------
    DtypeError, DeviceError, ArgumentError
        Something is not an array of float32 or float64, or the model's engine holds constants of landmarks; a name is
        no text, or is ``"__metadata__"``, which the format keeps for itself; the path is none.
    OSError
        The file cannot be written.
    """
    metadata = {}
    if isinstance(model_or_params, Transformer):
        metadata = {_METADATA: json.dumps(_config_to_json(model_or_params.config), allow_nan=False)}
        model_or_params = dict(model_or_params._checked_params())
    elif not isinstance(model_or_params, Mapping):
        raise ArgumentError(f"got a {type(model_or_params).__name__}; expected a Transformer or a dict of arrays")
    arrays = {name: _on_host(name, x) for name, x in model_or_params.items()}
    _files.write_safetensors(_files.path_text(path), arrays, metadata)


def _on_host(name: object, value: object) -> Array:
    if isinstance(value, np.floating):
        value = np.asarray(value)
    x = _check.floats(**{str(name): value})[0]
    if not isinstance(x, np.ndarray):
        raise DeviceError(
            f"{name} is a {_check.type_name(x)}; expected a NumPy array: nothing is copied from a device to be saved "
            "(cupy.asnumpy makes a copy)"
        )
    return x


def load(path: str | os.PathLike[str], *, names: Iterable[str] | None = None) -> Transformer | dict[str, Array]:
    """Read what `save` wrote: a Transformer where the file holds a configuration, else a dict of arrays.

    Parameters
    ----------
    path : path
        A safetensors file, of `save` or of another library.
    names : iterable of str, optional
        The arrays to read, as a dict, whatever else the file holds. Unless given: of a file with a configuration those
        of the model, else all.

    Returns
    -------
    Transformer or dict of str to ndarray
        Of the dtypes in the file, but that bfloat16 is widened to float32, which holds each of its numbers.

    Raises
    ------
    ArgumentError, ShapeError
        The file is not a safetensors file, or its configuration is not one, or not one of its arrays; it lacks an array
        that is asked for.
    DtypeError
        An array that is asked for is of a dtype that NumPy does not have, such as float8. Others do not matter.
    OSError
        The file cannot be read.
    """
    path = _files.path_text(path)
    with open(path, "rb") as file:
        stored = _files.SafeTensors(file, path)
        if names is not None:
            return stored.read(_listed(names))
        if not is_model(stored):
            return stored.read(stored.shapes)
        config = stored_config(stored)
        return Transformer(config, stored.read(config.param_shapes()))


def _listed(names: Iterable[str]) -> list[str]:
    try:
        listed = [None] if isinstance(names, str | bytes) else list(names)
    except TypeError:  # such as a class, or an array without axes
        listed = [None]
    if not all(isinstance(name, str) for name in listed):
        raise ArgumentError(f"names is {_check.shown(names)}; expected names of arrays")
    return listed  # type: ignore[return-value]


def _plain(record: object) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}  # pyright: ignore[reportArgumentType]


def _config_to_json(config: TransformerConfig) -> dict[str, Any]:
    if isinstance(config.engine, Landmark) and config.engine.constants is not None:
        raise ArgumentError(
            f"engine is {_check.shown(config.engine)}; expected one without constants: a file keeps no landmarks"
        )
    engine = {"kind": type(config.engine).__name__} | _plain(config.engine)
    # Those of a class derived from it are not known to `load`.
    return {f.name: getattr(config, f.name) for f in fields(TransformerConfig)} | {"engine": engine}


def is_model(stored: _files.SafeTensors) -> bool:
    """Whether a file holds a configuration beside its arrays."""
    return _METADATA in stored.metadata


def stored_config(stored: _files.SafeTensors) -> TransformerConfig:
    """The configuration in a file's metadata, once the file is known to hold that model's parameters.

    Raises
    ------
    ArgumentError, ShapeError
        It cannot be read, or the file lacks a parameter, or has one of another shape.
    """
    try:
        config = dict(json.loads(stored.metadata[_METADATA]))
        engine = dict(config.pop("engine"))
        kinds: dict[str, type[Engine]] = {kind.__name__: kind for kind in (Exact, Polynomial, Landmark, Auto)}
        made = kinds[engine.pop("kind")](**engine)
        # Before anything is made for each layer.
        layers = len({name.split(".")[1] for name in stored.shapes if name.startswith("layers.")})
        if config.get("n_layers") != layers:
            raise ValueError(
                f"n_layers is {_check.shown(config.get('n_layers'))}; expected {layers}, of which there are tensors"
            )
        result = TransformerConfig(**config, engine=made)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ArgumentError(f"the configuration in {stored.name} cannot be read: {error}") from error
    check_stored(stored, result)
    return result


def check_stored(stored: _files.SafeTensors, config: TransformerConfig) -> None:
    """Raise unless a file holds a model's parameters, in their shapes."""
    for name, shape in config.param_shapes().items():
        if name not in stored.shapes:
            raise ArgumentError(f"{stored.name} lacks {name!r}; expected an array of shape {shape}")
        if stored.shapes[name] != shape:
            raise ShapeError(
                f"{name} in {stored.name} has shape {stored.shapes[name]}; expected {shape} to match its configuration"
            )
