"""The errata of the paper (arXiv 2408.13233 v2): printed formulas fail a central difference, corrected ones pass.

``Attn(X) = f h`` with ``f`` the softmax of ``c X W X^T`` over each row and ``h = X W_V``; ``G = dL/dAttn`` for
``L = <G, Attn>``. With ``K = (G * (f h)) 1`` and ``P = f * (G h^T) - diag(K) f``, the product rule gives

``dL/dX = c (D2 + D4 + D6 + D7) + D8``: D4 and D2 are the two parts of ``P X W^T`` (X as the queries), D7 and D6 those
of ``P^T X W`` (X as the keys), and D8 is ``f^T G W_V^T`` (X as the values).
"""

import numpy as np
import pytest
from helpers import directional_derivative, relative_error
from limits import DIFFERENCE, GROSSLY_WRONG

N, D = 24, 5
C = 1 / D  # the paper's scale


class Layer:
    """One attention layer in the paper's letters."""

    def __init__(self, rng, causal):
        self.X = rng.standard_normal((N, D))
        self.W, self.W_V = rng.standard_normal((2, D, D))
        self.G = rng.standard_normal((N, D))
        self.M = np.tri(N) if causal else np.ones((N, N))

    def A(self, X, W):
        return self.M * np.exp(C * X @ W @ X.T)

    def attn(self, X, W, W_V):
        A = self.A(X, W)
        return (A / A.sum(axis=1, keepdims=True)) @ X @ W_V

    def parts(self):
        """``X, W, W_V, G, f, h, K``, the last as a column, so that ``K * f`` is ``diag(K) f``."""
        A = self.A(self.X, self.W)
        f, h = A / A.sum(axis=1, keepdims=True), self.X @ self.W_V
        return self.X, self.W, self.W_V, self.G, f, h, np.sum(self.G * (f @ h), axis=1, keepdims=True)

    def error(self, of, gradient):
        """The relative error of `gradient`, of the loss in ``X``, ``W`` or ``W_V``, by central differences."""
        arguments = {"X": self.X, "W": self.W, "W_V": self.W_V}

        def loss(x):
            return float(np.sum(self.G * self.attn(**(arguments | {of: x}))))

        x = arguments[of]
        slopes = [directional_derivative(loss, x, unit.reshape(x.shape)) for unit in np.eye(x.size)]
        return relative_error(gradient, np.reshape(slopes, x.shape))


def corrected_terms(X, W, W_V, G, f, h, K):
    return {
        "D2": -K * f @ X @ W.T,
        "D4": (f * (G @ h.T)) @ X @ W.T,
        "D6": -f.T @ (K * X) @ W,
        "D7": (f.T * (h @ G.T)) @ X @ W,
        "D8": f.T @ G @ W_V.T,
    }


def printed_terms(X, W, W_V, G, f, h, K):
    return {
        "D2": -K * f @ X @ W,
        "D4": (f * (G @ h.T)) @ X @ W,
        "D6": -f @ (K * X) @ W.T,
        "D7": (f * (h @ G.T)) @ X @ W.T,
        "D8": f @ G @ W_V.T,
    }


def sum_of_terms(terms):
    return C * (terms["D2"] + terms["D4"] + terms["D6"] + terms["D7"]) + terms["D8"]


@pytest.fixture(params=[False, True], ids=["full", "causal"])
def layer(request, rng):
    return Layer(rng, causal=request.param)


def assert_only_the_corrected_one_passes(layer, of, *, printed, corrected):
    assert layer.error(of, corrected) <= DIFFERENCE
    assert layer.error(of, printed) >= GROSSLY_WRONG


@pytest.mark.parametrize("row", [("D2", "D4"), ("D6", "D7"), ("D8",), ("D2",), ("D4",), ("D6",), ("D7",)], ids="+".join)
def test_terms_of_the_gradient_in_x_as_printed_fail(row, layer):
    corrected, printed = corrected_terms(*layer.parts()), printed_terms(*layer.parts())
    wrong = corrected | {term: printed[term] for term in row}
    assert_only_the_corrected_one_passes(layer, "X", printed=sum_of_terms(wrong), corrected=sum_of_terms(corrected))


def test_gradient_in_w_v_as_printed_fails(layer):
    X, _, _, G, f, _, _ = layer.parts()
    assert_only_the_corrected_one_passes(layer, "W_V", printed=X.T @ f @ G, corrected=X.T @ f.T @ G)


def low_rank(f):
    """``U1 V1^T = f``, all of its rank."""
    U, s, Vt = np.linalg.svd(f)
    return U * s, Vt.T


def row_wise_products(U, V):
    """The row-wise Khatri-Rao product: ``(U1 (x) U2)(V1 (x) V2)^T = (U1 V1^T) * (U2 V2^T)``."""
    return (U[:, :, None] * V[:, None, :]).reshape(len(U), -1)


def test_algorithm_1_line_22_as_printed_fails(layer):
    T, _, _, G, f, _, _ = layer.parts()
    U1, V1 = low_rank(f)
    assert_only_the_corrected_one_passes(
        layer, "W_V", printed=(T.T @ U1) @ (V1.T @ G), corrected=(T.T @ V1) @ (U1.T @ G)
    )


def test_algorithm_1_line_19_as_printed_fails(layer):
    T, _, _, G, f, h, K = layer.parts()
    U1, V1 = low_rank(f)
    U3, V3 = row_wise_products(U1, G), row_wise_products(V1, h)  # f * (G h^T)
    U4, V4 = K * U1, V1  # diag(K) f
    printed = C * (T.T @ U3) @ (V3.T @ T)
    corrected = printed - C * (T.T @ U4) @ (V4.T @ T)
    assert_only_the_corrected_one_passes(layer, "W", printed=printed, corrected=corrected)


def prefix_scan(U, V, B):
    """``(tril * U V^T) B``: row i sums over ``j <= i``."""
    return np.einsum("ir,irc->ic", U, np.cumsum(V[:, :, None] * B[:, None, :], axis=0))


def suffix_scan(U, V, B):
    """``(tril * U V^T)^T B``: row j sums over ``i >= j``."""
    return prefix_scan(V[::-1], U[::-1], B[::-1])[::-1]


def causal_gradients(layer, transposed):
    """All three gradients from low-rank factors and scans; `transposed` is the scan for ``f^T`` and ``P^T``."""
    X, W, W_V, G, _, h, K = layer.parts()
    A = np.exp(C * X @ W @ X.T)  # of any rank; the mask is the scan's
    U1, V1 = low_rank(A)
    U1 = U1 / (layer.M * A).sum(axis=1, keepdims=True)
    U3, V3 = row_wise_products(U1, G), row_wise_products(V1, h)
    U4, V4 = K * U1, V1
    PX = prefix_scan(U3, V3, X) - prefix_scan(U4, V4, X)
    PtX = transposed(U3, V3, X) - transposed(U4, V4, X)
    ftG = transposed(U1, V1, G)
    return {"X": C * PX @ W.T + C * PtX @ W + ftG @ W_V.T, "W": C * X.T @ PX, "W_V": X.T @ ftG}


def test_causal_gradient_needs_a_reverse_scan_too(rng):
    layer = Layer(rng, causal=True)
    both = causal_gradients(layer, suffix_scan)
    # One scan direction only: the transposed matrices summed over the tokens before.
    forward_only = causal_gradients(layer, lambda U, V, B: prefix_scan(V, U, B))
    for of in ("X", "W_V"):
        assert_only_the_corrected_one_passes(layer, of, printed=forward_only[of], corrected=both[of])
    assert layer.error("W", both["W"]) <= DIFFERENCE
