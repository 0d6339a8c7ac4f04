"""Bad input: the class of the error, and a message that names the argument, what it got and what it needs."""

import re

import numpy as np
import pytest
from conftest import GPU_NUMPY, RUST
from helpers import draw, random_params, small_config

import lingrad_rs as lg
from lingrad_rs import Exact, Polynomial
from lingrad_rs.backends import select

CONFIG = small_config()
PARAMS = random_params(CONFIG, np.random.default_rng(0))
INPUTS = draw(np.random.default_rng(0), n=32, m=32, d=6, dv=3)
Q, K, V, DOUT = (INPUTS[name] for name in ("q", "k", "v", "dout"))
X = np.random.default_rng(0).standard_normal((10, 6))
W = np.eye(6)
TOKENS = np.arange(10)
HUGE = np.full((6, 6), 1.7e308)


class OnGpu:
    """What CuPy's and PyTorch's arrays on a GPU have."""

    __cuda_array_interface__ = {"shape": (32, 6), "typestr": "<f8", "data": (0, True), "version": 3}  # noqa: RUF012


class NoText:
    """Cannot even be told."""

    def __repr__(self):
        raise RuntimeError("no text")


class NoAttributes:
    """Whatever is asked of it is an error of its own."""

    def __getattr__(self, name):
        raise KeyError(name)


def attend(**changes):
    options = {"q": Q, "k": K, "v": V} | changes
    lg.attention(options.pop("q"), options.pop("k"), options.pop("v"), **options)


def pull(dout):
    lg.attention_vjp(Q, K, V)[1](dout)


def heads(q, k, v=None):
    lg.attention(np.zeros((*q, 4, 6)), np.zeros((*k, 4, 6)), np.zeros((*(v or k), 4, 3)))


def self_attention(**changes):
    shapes = {"w_q": (6, 8), "w_k": (6, 4), "w_v": (6, 4), "w_o": (8, 6)}
    weights = {name: np.zeros(shape) for name, shape in shapes.items()} | {"n_heads": 4, "n_kv_heads": 2}
    given = {name: value for name, value in (weights | changes).items() if value is not None}
    return lg.SelfAttention(**given)


def model(**changes):
    params = PARAMS | changes
    return lg.Transformer(CONFIG, {name: x for name, x in params.items() if x is not None})


def spoiled(x, value=np.nan):
    x = x.copy()
    x.flat[x.size // 2] = value
    return x


def module(y=None, result=None, dx=None, grads=None, pulled=None):
    """A user's module that gives something wrong."""

    class Mine:
        def vjp(self, x):
            back = (lambda dy: pulled) if pulled is not None else lambda dy: (dy if dx is None else dx, grads or {})
            return result if result is not None else (x if y is None else y, back)

    return Mine()


def pull_chain(inner):
    y, pullback = lg.Chain([lg.Linear(w=W), inner]).vjp(X)
    pullback(y)


def big_endian(x):
    return x.astype(x.dtype.newbyteorder())


SHAPES = {
    "q has one axis": (lambda: attend(q=Q[0]), "q has shape (6,); expected (..., h, n, d)"),
    "k of another width": (
        lambda: attend(k=np.zeros((32, 5))),
        "k has shape (32, 5); expected (n, 6) to match q of shape (32, 6)",
    ),
    "k of another number of axes": (lambda: attend(k=K[None]), "k has shape (1, 32, 6); expected"),
    "v of another length": (lambda: attend(v=V[:31]), "v has shape (31, 3); expected (32, dv) to match k of shape"),
    "v has one axis": (lambda: attend(v=V[:, 0]), "v has shape (32,); expected (32, dv)"),
    "key_bias of another length": (
        lambda: attend(key_bias=np.zeros(31)),
        "key_bias has shape (31,); expected (32,) to match k",
    ),
    "dout of another shape": (lambda: pull(DOUT[:31]), "dout has shape (31, 3); expected (32, 3) to match out"),
    "no width": (lambda: attend(q=Q[:, :0], k=K[:, :0]), "q has shape (32, 0); expected a last axis of at least 1"),
    "values without width": (lambda: attend(v=V[:, :0]), "v has shape (32, 0); expected a last axis of at least 1"),
    "causal with n != m": (
        lambda: attend(k=K[:30], v=V[:30], causal=True),
        "k has shape (30, 6); expected (32, 6) to match q of shape (32, 6) with causal=True",
    ),
    "no keys": (lambda: attend(k=K[:0], v=V[:0]), "k has shape (0, 6); expected at least one key"),
    "heads that do not divide": (lambda: heads((4,), (3,)), "k has 3 heads (shape (3, 4, 6)); expected a number that"),
    "no key heads": (lambda: heads((4,), (0,)), "k has 0 heads"),
    "other heads of v": (lambda: heads((4,), (2,), (4,)), "v has shape (4, 4, 3); expected (2, 4, dv)"),
    "another batch": (lambda: heads((2, 4), (3, 4)), "k has shape (3, 4, 4, 6); expected (2, h_kv, n, 6)"),
    "out to measure": (lambda: lg.measure_error(Q, K, V, DOUT[:9]), "out has shape (9, 3); expected (32, 3)"),
    "linear w": (lambda: lg.Linear(w=W[0]), "w has shape (6,); expected (d, e)"),
    "linear b": (lambda: lg.Linear(w=W, b=np.zeros(5)), "b has shape (5,); expected (6,) to match w of shape (6, 6)"),
    "linear x": (lambda: lg.Linear(w=W).vjp(X[:, :5]), "x has shape (10, 5); expected (..., n, 6) to match w of shape"),
    "linear x of one axis": (lambda: lg.Linear(w=W).vjp(X[0]), "x has shape (6,); expected (..., n, 6)"),
    "linear dy": (lambda: lg.Linear(w=W).vjp(X)[1](X[:9]), "dy has shape (9, 6); expected (10, 6) to match y"),
    "activation x": (lambda: lg.Activation("relu").vjp(X[0]), "x has shape (6,); expected (..., n, d)"),
    "rms norm gain": (lambda: lg.RMSNorm(gain=W), "gain has shape (6, 6); expected (d,)"),
    "rms norm x": (lambda: lg.RMSNorm(gain=W[0]).vjp(X[:, :5]), "x has shape (10, 5); expected (..., n, 6) to match"),
    "layer norm bias": (lambda: lg.LayerNorm(gain=W[0], bias=W[0][:5]), "bias has shape (5,); expected (6,) to match"),
    "feed-forward w_out": (
        lambda: lg.FeedForward(w_in=W, w_out=W[:5], activation="relu"),
        "w_out has shape (5, 6); expected (6, e) to match w_in of shape (6, 6)",
    ),
    "embedding": (lambda: lg.Embedding(embed=W[0]), "embed has shape (6,); expected (vocab, d)"),
    "embedding of a number": (lambda: lg.Embedding(embed=W).vjp(np.array(3)), "tokens has shape (); expected (..., n)"),
    "paper's w not square": (lambda: lg.SelfAttention(w=W[:5], w_v=W), "w has shape (5, 6); expected (5, 5)"),
    "paper's w_v": (lambda: lg.SelfAttention(w=W, w_v=W[:5]), "w_v has shape (5, 6); expected (6, e) to match w"),
    "paper's w_v without columns": (
        lambda: lg.SelfAttention(w=W, w_v=W[:, :0]),
        "w_v has shape (6, 0); expected at least one column",
    ),
    "paper's w of no width": (
        lambda: lg.SelfAttention(w=W[:0, :0], w_v=W[:0]),
        "w has shape (0, 0); expected at least one column",
    ),
    "w_q not for the heads": (
        lambda: self_attention(w_q=np.zeros((6, 9))),
        "w_q has shape (6, 9); expected (6, a multiple of n_heads = 4)",
    ),
    "w_k": (lambda: self_attention(w_k=np.zeros((6, 5))), "w_k has shape (6, 5); expected (6, 4) to match w_q"),
    "w_v": (
        lambda: self_attention(w_v=np.zeros((6, 5))),
        "w_v has shape (6, 5); expected (6, a multiple of n_kv_heads",
    ),
    "w_o": (lambda: self_attention(w_o=np.zeros((7, 6))), "w_o has shape (7, 6); expected (8, e) to match w_v"),
    "residual of another width": (
        lambda: lg.Residual(lg.Linear(w=W[:, :4])).vjp(X),
        "y of module (Linear) has shape (10, 4); expected (10, 6) to match x",
    ),
    "a user's dx": (lambda: pull_chain(module(dx=X[:5])), "dx of modules[1] (Mine) has shape (5, 6); expected (10, 6)"),
    "a parameter": (lambda: model(embed=np.zeros((13, 15))), "embed has shape (13, 15); expected (13, 16) to match"),
    "targets": (lambda: model().value_and_grad(TOKENS, TOKENS[:9]), "targets has shape (9,); expected (10,) to match"),
    "no tokens": (lambda: model().value_and_grad(TOKENS[:0], TOKENS[:0]), "tokens has shape (0,); expected at least"),
    "embeddings": (lambda: model().vjp(np.zeros((10, 15))), "x has shape (10, 15); expected (..., n, 16) to match"),
    "dy of a model": (lambda: model().vjp(TOKENS)[1](X), "dy has shape (10, 6); expected (10, 13) to match y"),
}

DTYPES = {
    "float16": (lambda: attend(q=Q.astype(np.float16)), "k has dtype float64; expected float16 to match q"),
    "integers": (lambda: attend(k=K.astype(int)), "k has dtype int64; expected float32 or float64"),
    "objects": (lambda: attend(v=V.astype(object)), "v has dtype object; expected float32 or float64"),
    "complex": (lambda: attend(q=Q.astype(complex)), "q has dtype complex128; expected float32 or float64"),
    "long double": (lambda: attend(q=Q.astype(np.longdouble)), "expected float32 or float64"),
    "booleans": (lambda: attend(q=Q > 0), "q has dtype bool; expected float32 or float64"),
    "another byte order": (lambda: attend(q=big_endian(Q)), "q has dtype >f8 (not in this machine's byte order)"),
    "mixed dtypes": (
        lambda: attend(k=K.astype(np.float32)),
        "k has dtype float32; expected float64 to match q",
    ),
    "mixed dtype of key_bias": (
        lambda: attend(key_bias=np.zeros(32, np.float32)),
        "key_bias has dtype float32; expected float64 to match q",
    ),
    "mixed dtype of dout": (lambda: pull(DOUT.astype(np.float32)), "dout has dtype float32; expected float64"),
    "a list": (lambda: attend(q=Q.tolist()), "q is a list; expected a NumPy array"),
    "None": (lambda: attend(v=None), "v is a NoneType; expected a NumPy array"),
    "a masked array": (lambda: attend(q=np.ma.array(Q)), "q is a masked array"),
    "an object whose attributes raise": (
        lambda: attend(q=NoAttributes()),
        "q is a test_bad_input.NoAttributes; expected a NumPy array",
    ),
    "unaligned": (
        lambda: attend(q=np.frombuffer(b"\0" + Q.tobytes(), np.uint8)[1:].view(np.float64).reshape(Q.shape)),
        "q is not aligned",
    ),
    "a list as a weight": (lambda: lg.Linear(w=W.tolist()), "w is a list; expected a NumPy array"),
    "mixed dtypes of weights": (lambda: lg.Linear(w=W, b=np.zeros(6, np.float32)), "b has dtype float32; expected"),
    "x not as w": (
        lambda: lg.Linear(w=W).vjp(X.astype(np.float32)),
        "x has dtype float32; expected float64 to match w",
    ),
    "dy not as y": (lambda: lg.Linear(w=W).vjp(X)[1](X.astype(np.float32)), "dy has dtype float32; expected float64"),
    "float tokens": (lambda: lg.Embedding(embed=W).vjp(X), "tokens has dtype float64; expected an integer dtype"),
    "float tokens of a model": (lambda: model().value_and_grad(X, TOKENS), "tokens has dtype float64; expected an int"),
    "float targets": (lambda: model().value_and_grad(TOKENS, X), "targets has dtype float64; expected an integer"),
    "a list of tokens": (lambda: model().value_and_grad(list(TOKENS), TOKENS), "tokens is a list; expected a NumPy"),
    "one parameter of another dtype": (
        lambda: model(head=PARAMS["head"].astype(np.float32)),
        "head has dtype float32; expected float64 to match embed",
    ),
    "a user's module": (lambda: lg.Chain([module(y=[1.0])]).vjp(X), "y of modules[0] (Mine) is a list; expected"),
    "a user's module of another dtype": (
        lambda: lg.Chain([module(y=X.astype(np.float32))]).vjp(X),
        "y of modules[0] (Mine) has dtype float32; expected float64 to match x",
    ),
}

NOT_FINITE = {
    "NaN in q": (lambda: attend(q=spoiled(Q)), "q holds NaN or infinity"),
    "infinity in k": (lambda: attend(k=spoiled(K, np.inf)), "k holds NaN or infinity"),
    "-infinity in v": (lambda: attend(v=spoiled(V, -np.inf)), "v holds NaN or infinity"),
    "NaN in key_bias": (lambda: attend(key_bias=spoiled(np.zeros(32))), "key_bias holds NaN"),
    "infinity in key_bias": (lambda: attend(key_bias=spoiled(np.zeros(32), np.inf)), "key_bias holds inf"),
    "NaN in dout": (lambda: pull(spoiled(DOUT)), "dout holds NaN or infinity"),
    "NaN in q, exact": (lambda: attend(q=spoiled(Q), engine=Exact()), "q holds NaN or infinity"),
    "NaN in out": (lambda: lg.measure_error(Q, K, V, spoiled(DOUT)), "out holds NaN or infinity"),
    "NaN in x of linear": (lambda: lg.Linear(w=W).vjp(spoiled(X)), "x holds NaN or infinity"),
    "NaN in w": (lambda: lg.Linear(w=spoiled(W)).vjp(X), "w holds NaN or infinity"),
    "NaN in b": (lambda: lg.Linear(w=W, b=spoiled(W[0])).vjp(X), "b holds NaN or infinity"),
    "NaN in dy": (lambda: lg.Linear(w=W).vjp(X)[1](spoiled(X)), "dy holds NaN or infinity"),
    "NaN in x of an activation": (lambda: lg.Activation("relu").vjp(spoiled(X)), "x holds NaN or infinity"),
    "NaN in gain": (lambda: lg.RMSNorm(gain=spoiled(W[0])).vjp(X), "gain holds NaN or infinity"),
    "NaN in bias": (lambda: lg.LayerNorm(gain=W[0], bias=spoiled(W[0])).vjp(X), "bias holds NaN or infinity"),
    "NaN in w_in": (
        lambda: lg.FeedForward(w_in=spoiled(W), w_out=W, activation="silu").vjp(X),
        "w_in holds NaN or infinity",
    ),
    "NaN in embed": (lambda: lg.Embedding(embed=spoiled(W)).vjp(TOKENS[:6]), "embed holds NaN or infinity"),
    "NaN in x of attention": (lambda: lg.SelfAttention(w=W, w_v=W).vjp(spoiled(X)), "x holds NaN or infinity"),
    "NaN in w of attention": (lambda: lg.SelfAttention(w=spoiled(W), w_v=W).vjp(X), "w holds NaN or infinity"),
    "infinity in a parameter": (
        lambda: model(head=spoiled(PARAMS["head"], np.inf)).value_and_grad(TOKENS, TOKENS),
        "head holds NaN or infinity",
    ),
    "NaN in embeddings": (lambda: model().vjp(spoiled(np.zeros((10, 16)))), "x holds NaN or infinity"),
    "a huge y of linear": (lambda: lg.Linear(w=HUGE).vjp(HUGE), "y overflows: the arguments are too large for their"),
    "a huge dx of linear": (lambda: lg.Linear(w=1e200 * W).vjp(X)[1](1e200 * X), "dx overflows"),
    "a huge gradient of w": (lambda: lg.Linear(w=W).vjp(HUGE)[1](HUGE), "the gradient of w overflows"),
    "a huge gradient of b": (
        lambda: lg.Linear(w=0 * W, b=W[0]).vjp(0 * HUGE)[1](HUGE),
        "the gradient of b overflows",
    ),
    "a huge y of feed-forward": (
        lambda: lg.FeedForward(w_in=HUGE, w_out=HUGE, activation="relu").vjp(X),
        "y overflows",
    ),
    "a huge y of a norm": (lambda: lg.RMSNorm(gain=HUGE[0]).vjp(np.array([[1.0, 0, 0, 0, 0, 0]])), "y overflows"),
    "a huge gradient of a bias": (
        lambda: lg.LayerNorm(gain=0 * W[0], bias=W[0]).vjp(HUGE[:2] / 1e300)[1](HUGE[:2]),
        "the gradient of bias overflows",
    ),
    "a huge gradient of embed": (
        lambda: lg.Embedding(embed=W).vjp(TOKENS[:2] * 0)[1](HUGE[:2]),
        "the gradient of embed overflows",
    ),
    "a huge y of attention": (
        lambda: self_attention(w_v=np.ones((6, 4)), w_o=np.full((8, 6), 1.7e308)).vjp(np.ones((3, 6))),
        "y overflows",
    ),
    "a huge y of a residual": (lambda: lg.Residual(lg.Linear(w=W)).vjp(HUGE), "y overflows"),
    "a huge dx of a residual": (lambda: lg.Residual(lg.Linear(w=W)).vjp(0 * X[:6])[1](HUGE), "dx overflows"),
    "huge logits": (lambda: model(head=np.full((16, 13), 1.7e308)).vjp(TOKENS), "y overflows"),
    "a huge loss": (
        lambda: model(head=np.full((16, 13), 1e308) * np.sign(np.arange(13) - 6)).value_and_grad(TOKENS, 0 * TOKENS),
        "cross-entropy",
    ),
    "a huge gradient of a model": (
        lambda: model(head=np.zeros((16, 13))).vjp(TOKENS)[1](np.full((10, 13), 1.7e308)),
        "the gradient of head overflows",
    ),
    "huge values": (lambda: lg.attention(Q, K, np.full((32, 3), 1e308)), "out overflows in head 0"),
    "huge values and gradients": (
        lambda: lg.attention_vjp(Q, K, 1e200 * V)[1](1e200 * DOUT),
        "overflows in head 0 (counting from 0)",
    ),
    "a huge gradient of the bias": (
        # Of queries and keys of 0, all gradients but this one are sums of a few small numbers.
        lambda: lg.attention_vjp(0 * Q[:4], 0 * K[:2], np.array([[1e154], [-1e154]]), key_bias=np.zeros(2))[1](
            np.full((4, 1), 1.5e154)
        ),
        "dkey_bias overflows in head 0",
    ),
    "NaN in coefficients": (
        lambda: Polynomial(coefficients=(1, np.nan, 0.5)),
        "coefficients is (1, nan, 0.5); expected",
    ),
}

DEVICES = {
    "q on a GPU": (lambda: attend(q=OnGpu()), "q is a test_bad_input.OnGpu on a GPU"),
    "v on a GPU": (lambda: attend(v=OnGpu()), "v is a test_bad_input.OnGpu on a GPU"),
    "dout on a GPU": (lambda: pull(OnGpu()), "dout is a test_bad_input.OnGpu on a GPU"),
    "key_bias on a GPU": (lambda: attend(key_bias=OnGpu()), "key_bias is a test_bad_input.OnGpu on a GPU"),
    "a weight on a GPU": (lambda: lg.Linear(w=OnGpu()), "w is a test_bad_input.OnGpu on a GPU"),
    "x on a GPU": (lambda: lg.Linear(w=W).vjp(OnGpu()), "x is a test_bad_input.OnGpu on a GPU"),
    "tokens on a GPU": (lambda: model().value_and_grad(OnGpu(), TOKENS), "tokens is a test_bad_input.OnGpu on a GPU"),
    "a parameter on a GPU": (lambda: model(head=OnGpu()), "head is a test_bad_input.OnGpu on a GPU"),
}

ARGUMENTS = {
    "engine by name": (lambda: attend(engine="exact"), "engine is 'exact'; expected Exact(), Polynomial(...)"),
    "engine as a class": (lambda: attend(engine=Exact), "expected Exact(), Polynomial(...)"),
    "causal as a number": (lambda: attend(causal=1), "causal is 1; expected True or False"),
    "scale not finite": (lambda: attend(scale=np.inf), "scale is inf; expected a finite number"),
    "scale not a number": (lambda: attend(scale="1"), "scale is '1'; expected a finite number"),
    "samples": (lambda: lg.measure_error(Q, K, V, DOUT, samples=0), "samples is 0; expected"),
    "seed of a measurement": (lambda: lg.measure_error(Q, K, V, DOUT, seed=-1), "seed is -1; expected"),
    "degree 0": (lambda: Polynomial(degree=0), "degree is 0; expected"),
    "degree not an integer": (lambda: Polynomial(degree=2.0), "degree is 2.0; expected an integer >= 1"),
    "degree too high for any memory": (
        lambda: lg.attention(np.zeros((4, 64)), np.zeros((4, 64)), V[:4], engine=Polynomial(degree=12)),
        "degree = 12 with d = 64 and dv = 3 needs more monomials",
    ),
    "unknown coefficients": (
        lambda: Polynomial(coefficients="best"),
        "coefficients is 'best'; expected 'taylor', 'fitted'",
    ),
    "too few coefficients": (
        lambda: Polynomial(coefficients=(1, 1)),
        "coefficients is (1, 1); expected degree + 1 = 3",
    ),
    "coefficients without end": (
        lambda: Polynomial(coefficients=range(10**12)),
        "coefficients is range(0, 1000000000000); expected degree + 1 = 3",
    ),
    "a coefficient beyond all floats": (lambda: Polynomial(coefficients=(1, 10**400, 1)), "expected degree + 1 = 3"),
    "coefficients that are text": (lambda: Polynomial(coefficients=np.array(["1", "1", "1"])), "expected degree + 1"),
    "coefficients that are complex": (lambda: Polynomial(coefficients=np.ones(3, complex)), "expected degree + 1 = 3"),
    "coefficients with a mask": (
        lambda: Polynomial(coefficients=np.ma.array([1, 1, 1], mask=[0, 1, 0])),
        "expected degree + 1 = 3",
    ),
    "a column of coefficients": (lambda: Polynomial(coefficients=np.ones((3, 1))), "expected degree + 1 = 3"),
    "coefficients that are no array": (lambda: Polynomial(coefficients=np.array(1.0)), "expected degree + 1 = 3"),
    "too many fitted coefficients": (
        lambda: lg.attention(Q[:4, :1], K[:4, :1], V[:4], engine=Polynomial(8000, coefficients="fitted")),
        'degree = 8000 with coefficients="fitted"; expected a degree of at most 512',
    ),
    "a degree beyond all monomials": (
        lambda: lg.attention(Q[:, :1], K[:, :1], V, engine=Polynomial(2**63 - 1)),
        "degree = 9223372036854775807 with d = 1",
    ),
    "a shift beyond all floats": (
        lambda: Polynomial(shift=((10**400,), (1,))),
        "expected 'none', 'mean' or two sequences of d numbers",
    ),
    "a shift of bytes": (lambda: Polynomial(shift=(b"ab", b"cd")), "expected 'none', 'mean' or two sequences"),
    "a shift without end": (lambda: Polynomial(shift=range(10**12)), "expected 'none', 'mean' or two sequences"),
    "unknown gradient": (
        lambda: Polynomial(gradient="exact"),
        "gradient is 'exact'; expected one of 'closed_form', 'con",
    ),
    "unknown shift": (lambda: Polynomial(shift="median"), "shift is 'median'; expected one of 'none', 'mean'"),
    "unknown diagonal": (
        lambda: Polynomial(diagonal="none"),
        "diagonal is 'none'; expected one of 'exact', 'polynomial'",
    ),
    "negative window": (lambda: Polynomial(window=-1), "window is -1; expected"),
    "shift with causal": (
        lambda: attend(engine=Polynomial(shift="mean"), causal=True),
        'shift="mean" takes means over all tokens, so with causal=True a token would see later ones',
    ),
    "fitted polynomial diagonal with causal": (
        lambda: attend(engine=Polynomial(coefficients="fitted", diagonal="polynomial"), causal=True),
        'coefficients="fitted" with causal=True and diagonal="polynomial"',
    ),
    "more digits than Python tells": (
        lambda: lg.measure_error(Q, K, V, DOUT, samples=10**5000),
        "samples is <int>; expected an integer below 2**63",
    ),
    "a negative number of more digits": (lambda: lg.set_num_threads(-(10**5000)), "n is <int>; expected an integer"),
    "what has no text": (lambda: attend(engine=NoText()), "engine is <test_bad_input.NoText>; expected Exact(), Poly"),
    "what holds what has no text": (lambda: attend(scale=[NoText()]), "scale is <list>; expected a finite number"),
    "a text without end": (lambda: attend(engine="x" * 10**6), "xxx...; expected Exact(), Polynomial(...)"),
    "threads": (lambda: lg.set_num_threads(0), "n is 0; expected"),
    "threads not an integer": (lambda: lg.set_num_threads(1.5), "n is 1.5; expected an integer >= 1"),
    "far too many threads": (lambda: lg.set_num_threads(10**9), "n is 1000000000; expected 1 <= n <= "),
    "unknown activation": (
        lambda: lg.Activation("gelu"),
        "kind is 'gelu'; expected one of 'relu', 'silu', 'gelu_tanh'",
    ),
    "unknown activation of feed-forward": (
        lambda: lg.FeedForward(w_in=W, w_out=W, activation="swish"),
        "activation is 'swish'; expected one of 'relu', 'silu', 'gelu_tanh'",
    ),
    "eps 0": (lambda: lg.RMSNorm(gain=W[0], eps=0), "eps is 0.0; expected a number above 0"),
    "no weights": (lambda: lg.SelfAttention(), "got the weights none; expected w and w_v, or w_q, w_k, w_v and w_o"),
    "half the weights": (lambda: lg.SelfAttention(w=W), "got the weights w; expected w and w_v, or"),
    "weights of both forms": (lambda: lg.SelfAttention(w=W, w_v=W, w_o=W), "got the weights w, w_o, w_v; expected"),
    "heads of the paper's form": (lambda: lg.SelfAttention(w=W, w_v=W, n_heads=2), "n_heads, n_kv_heads, rope and"),
    "rope of the paper's form": (lambda: lg.SelfAttention(w=W, w_v=W, rope=True), "need w_q, w_k, w_v, w_o"),
    "no n_heads": (lambda: self_attention(n_heads=None), "n_heads is missing; expected an integer >= 1"),
    "key heads that do not divide": (
        lambda: self_attention(n_kv_heads=3),
        "n_kv_heads is 3; expected a divisor of n_heads = 4",
    ),
    "odd rope": (
        lambda: self_attention(w_q=np.zeros((6, 12)), w_k=np.zeros((6, 6)), rope=True),
        "rope=True with heads of width 3; expected an even width",
    ),
    "score bound 0": (lambda: self_attention(score_bound=0.0), "score_bound is 0.0; expected a number above 0"),
    "score bound and scale": (
        lambda: self_attention(score_bound=1.0, scale=1.0),
        "scale and score_bound are both given",
    ),
    "an object whose attributes raise as a module": (
        lambda: lg.Chain([NoAttributes()]),
        "modules[0] is <test_bad_input.NoAttributes",
    ),
    "not a module": (lambda: lg.Residual(abs), "expected a module: an object with vjp(x) -> (y, pullback)"),
    "a class as a module": (lambda: lg.Chain([lg.Linear]), "modules[0] is <class"),
    "one module as a chain": (lambda: lg.Chain(lg.Activation("relu")), "expected a sequence of modules"),
    "a user's vjp": (lambda: lg.Chain([module(result=X)]).vjp(X), "modules[0] (Mine): vjp returned ndarray; expected"),
    "a user's pullback": (
        lambda: pull_chain(module(pulled=X)),
        "modules[1] (Mine): pullback returned ndarray; expected",
    ),
    "a user's grads": (lambda: pull_chain(module(grads=3.0)), "grads of modules[1] (Mine) is 3.0; expected a dict"),
    "token too large": (lambda: lg.Embedding(embed=W).vjp(TOKENS), "tokens holds 9; expected 0 <= token < 6"),
    "token below 0": (lambda: lg.Embedding(embed=W).vjp(TOKENS - 1), "tokens holds -1; expected 0 <= token < 6"),
    "token too large for a model": (lambda: model().vjp(TOKENS + 4), "tokens holds 13; expected 0 <= token < 13"),
    "target too large": (
        lambda: model().value_and_grad(TOKENS, TOKENS + 4),
        "targets holds 13; expected 0 <= token < 13",
    ),
    "no targets": (lambda: model().value_and_grad(TOKENS), "targets is missing"),
    "loss without a gradient": (
        lambda: model().value_and_grad(TOKENS, loss=lambda y: 1.0),
        "loss returned float; expect",
    ),
    "a loss that is no function": (
        lambda: model().value_and_grad(TOKENS, loss=3),
        "loss is 3; expected a callable",
    ),
    "a loss that is no number": (
        lambda: model().value_and_grad(TOKENS, loss=lambda y: ("low", y)),
        "loss returned the value 'low'; expected a number",
    ),
    "a loss beyond all floats": (
        lambda: model().value_and_grad(TOKENS, loss=lambda y: (10**400, y)),
        "expected a number",
    ),
    "progress": (lambda: model().value_and_grad(TOKENS, TOKENS, progress=1), "progress is 1; expected a callable"),
    "a missing parameter": (lambda: model(head=None), "params lacks 'head'; expected an array of shape (16, 13)"),
    "an unknown parameter": (lambda: model(tail=W), "params holds 'tail', which the model does not have"),
    "a list of parameters": (lambda: lg.Transformer(CONFIG, [W]), "params is a list; expected a dict"),
    "no config": (lambda: lg.Transformer({}), "config is {}; expected a TransformerConfig"),
    "seed of a model": (lambda: lg.Transformer(CONFIG, seed=-1), "seed is -1; expected"),
    "dtype of a model that raises": (
        lambda: lg.Transformer(CONFIG, dtype=NoAttributes()),
        "dtype is <test_bad_input.NoAttributes",
    ),
    "dtypes of a model": (lambda: lg.Transformer(CONFIG, dtype={"names": ["a"], "formats": 3}), "expected float32 or"),
    "dtype of a model": (lambda: lg.Transformer(CONFIG, dtype=np.float16), "expected float32 or float64"),
    "model of a set": (lambda: lg.save("unused", {1, 2}), "got a set; expected a Transformer or a dict of arrays"),
}

CONFIGS = {
    "n_layers": (0, "n_layers is 0; expected"),
    "d_model": (15, "n_heads is 4; expected a divisor of d_model = 15"),
    "n_heads": (2.0, "n_heads is 2.0; expected an integer >= 1"),
    "n_kv_heads": (3, "n_kv_heads is 3; expected a divisor"),
    "d_ff": (-1, "d_ff is -1; expected"),
    "vocab_size": ("256", "vocab_size is '256'; expected an integer >= 1"),
    "causal": (None, "causal is None; expected True or False"),
    "norm": ("batch", "norm is 'batch'; expected one of 'rms', 'layer'"),
    "activation": ("tanh", "activation is 'tanh'; expected one of 'relu', 'silu', 'gelu_tanh'"),
    "rope": (1, "rope is 1; expected True or False"),
    "score_bound": (-2.0, "score_bound is -2.0; expected a number above 0"),
    "engine": ("polynomial", "engine is 'polynomial'; expected Exact(), Polynomial(...)"),
}

BIG = 10 * np.ones((4, 6))
DENOMINATORS = {
    "odd degree": (
        lambda: lg.attention(BIG, -BIG, V[:4], engine=Polynomial(degree=3)),
        "row 0 of head 0 has the denominator -",
    ),
    "given coefficients": (
        lambda: lg.attention(BIG, BIG, V[:4], engine=Polynomial(coefficients=(1, 1, -1))),
        "which is not positive",
    ),
    "all coefficients 0": (lambda: attend(engine=Polynomial(coefficients=(0, 0, 0))), "is not positive"),
    "overflow": (
        lambda: lg.attention(*3 * [(1e9 * BIG).astype(np.float32)], engine=Polynomial(degree=4)),
        "a denominator that overflows",
    ),
    "fit of huge scores": (
        lambda: lg.attention(BIG, BIG, V[:4], engine=Polynomial(coefficients="fitted")),
        'coefficients="fitted": sampled scores reach',
    ),
    "all keys removed": (lambda: attend(key_bias=np.full(32, -np.inf)), "no key to attend to"),
    "all keys removed, exact": (lambda: attend(key_bias=np.full(32, -np.inf), engine=Exact()), "no key to attend to"),
    "first key removed, causal": (
        lambda: attend(key_bias=np.where(np.arange(32) == 0, -np.inf, 0), causal=True),
        "row 0 of head 0 has no key to attend to",
    ),
    "first key removed, causal, exact": (
        lambda: attend(key_bias=np.where(np.arange(32) == 0, -np.inf, 0), causal=True, engine=Exact()),
        "row 0 of head 0 has no key to attend to",
    ),
}


# The GPU path under NumPy has the same arrays, and is to say the same of them.
@pytest.fixture
def refused(monkeypatch):
    """``refused(error, message, call)``: the call raises it on the compiled core, and on the array path."""

    def check(error, message, call):
        for backend in (RUST, GPU_NUMPY):
            with monkeypatch.context() as patch:
                patch.setattr(select, "KINDS", [*backend.kinds, *select.KINDS])
                with pytest.raises(error, match=re.escape(message)):
                    call()

    return check


def cases(table):
    return pytest.mark.parametrize(("call", "message"), table.values(), ids=table.keys())


@cases(SHAPES)
def test_wrong_shape_is_a_shape_error(call, message, refused):
    refused(lg.ShapeError, message, call)


@cases(DTYPES)
def test_wrong_dtype_is_a_dtype_error(call, message, refused):
    refused(lg.DtypeError, message, call)


@cases(NOT_FINITE)
def test_nan_and_infinity_are_a_non_finite_error(call, message, refused):
    refused(lg.NonFiniteError, message, call)


@cases(DEVICES)
def test_an_array_on_a_gpu_is_a_device_error(call, message):
    with pytest.raises(lg.DeviceError, match=re.escape(message)):
        call()


@cases(ARGUMENTS)
def test_wrong_option_is_an_argument_error(call, message, refused):
    refused(lg.ArgumentError, message, call)


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_field_of_a_config_is_an_argument_error(name):
    value, message = CONFIGS[name]
    with pytest.raises(lg.ArgumentError, match=re.escape(message)):
        small_config(**{name: value})


def test_odd_rope_width_of_a_config_is_an_argument_error():
    with pytest.raises(lg.ArgumentError, match="even"):
        small_config(d_model=12)


@cases(DENOMINATORS)
def test_a_row_without_a_positive_denominator_is_a_denominator_error(call, message, refused):
    refused(lg.DenominatorError, message, call)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: attend(engin=Exact()), "engin"),
        (lambda: Polynomial(order=2), "order"),
        (lambda: lg.Linear(W), "argument"),
    ],
)
def test_unknown_names_are_python_s_own_error(call, name):
    with pytest.raises(TypeError, match=name):
        call()


def test_a_user_s_exception_in_a_progress_callback_stops_the_call():
    class Enough(Exception):
        pass

    def progress(fraction):
        raise Enough(fraction)

    with pytest.raises(Enough):
        model().value_and_grad(TOKENS, TOKENS, progress=progress)
    assert np.isfinite(model().value_and_grad(TOKENS, TOKENS)[0])


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (lg.ShapeError, ValueError),
        (lg.DtypeError, TypeError),
        (lg.NonFiniteError, ValueError),
        (lg.ToleranceError, ValueError),
        (lg.DeviceError, TypeError),
        (lg.ArgumentError, ValueError),
        (lg.DenominatorError, ArithmeticError),
    ],
)
def test_errors_are_of_the_library_and_of_python_s_own_kind(error, base):
    assert issubclass(error, lg.LingradError)
    assert issubclass(error, base)
    assert issubclass(lg.LingradError, Exception)


def test_a_failed_call_leaves_the_library_sound():
    with pytest.raises(lg.NonFiniteError):
        attend(q=spoiled(Q))
    assert np.isfinite(lg.attention(Q, K, V)).all()


def test_errors_are_measured_whatever_the_scale(backend):
    """Its square is beyond any float."""
    q, dout = backend.array(np.zeros((40, 4))), backend.array(np.ones((40, 4)))
    _, vjp = lg.attention_vjp(q, q, dout, scale=1e200, causal=True, engine=Polynomial(degree=2))
    dq, *_ = vjp(dout, samples=20)
    assert not backend.numpy(dq).any()
