"""The float64 oracle of attention: O(n m) time and memory, obvious on purpose.

One head: ``s = c q k^T + b``, ``A = exp(s)`` or ``A = p(c q k^T) exp(b)``, ``f = A / row sums``, ``out = f v``. With
``delta_i = dout_i . out_i`` and ``dS = f * (dout v^T - delta 1^T)`` the gradients are ``dq = c dS k``,
``dk = c dS^T q``, ``dv = f^T dout`` and ``dkey_bias = dS^T 1``.
"""

import math

import numpy as np


def attention(inputs, engine, *, causal=False, scale=None, near=None):
    """``{"out", "dq", "dk", "dv", "dkey_bias"}`` of arrays ``(..., h, n, d)``, or ``(n, d)`` for one head.

    `inputs` holds float64 ``q, k, v, dout`` and perhaps ``key_bias``. `engine` is None for exp, or a dict with
    ``coefficients`` (a list, "taylor" or "fitted"), ``degree``, ``gradient`` and ``shift``. Where `near` (n, m) holds,
    exp stands in place of the polynomial.
    """
    q, k, v, dout = (np.asarray(inputs[name], np.float64) for name in ("q", "k", "v", "dout"))
    bias = np.asarray(inputs.get("key_bias", np.zeros(k.shape[:-1])), np.float64)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    result = {"out": np.zeros(dout.shape), "dq": np.zeros(q.shape), "dk": np.zeros(k.shape), "dv": np.zeros(v.shape)}
    result["dkey_bias"] = np.zeros(bias.shape)
    for at in np.ndindex(q.shape[:-2]):
        kv = (*at[:-1], at[-1] // group) if at else at
        out, dq, dk, dv, db = _head(q[at], k[kv], v[kv], bias[kv], dout[at], engine, causal, scale, near)
        result["out"][at], result["dq"][at] = out, dq
        result["dk"][kv] += dk
        result["dv"][kv] += dv
        result["dkey_bias"][kv] += db
    return result


def _head(q, k, v, b, dout, engine, causal, c, near):
    if engine is None:
        return _gradients(q, k, v, dout, c, *_softmax(c * q @ k.T + b, causal))
    consistent = engine["gradient"] == "consistent"
    alpha = beta = np.zeros(q.shape[1])
    if engine["shift"] == "mean":
        alpha, beta = q.mean(axis=0), k[b > -np.inf].mean(axis=0)
    # The same scores up to constants of a row.
    q1, k1 = q - alpha, k - beta
    b1 = b + c * k1 @ alpha
    f, slope = _polynomial(c * q1 @ k1.T, b1, _coefficients(engine, c * q1 @ k1.T, b1), causal, near)
    if not consistent:  # the exact gradient's formula with this f
        return _gradients(q, k, v, dout, c, f, f)
    # The derivative in q1, k1 and b1, and from there through the means.
    out, dq1, dk1, dv, db = _gradients(q1, k1, v, dout, c, f, slope)
    if engine["shift"] == "none":
        return out, dq1, dk1, dv, db
    dk1 = dk1 + c * np.outer(db, alpha)
    dalpha = -dq1.sum(axis=0) + c * k1.T @ db
    dbeta = -dk1.sum(axis=0)
    live = b > -np.inf
    return out, dq1 + dalpha / len(q), dk1 + np.outer(live, dbeta / live.sum()), dv, db


def _softmax(s, causal):
    if causal:
        s = np.where(np.tri(*s.shape, dtype=bool), s, -np.inf)
    a = np.exp(s - s.max(axis=1, keepdims=True, initial=-np.inf))
    f = a / a.sum(axis=1, keepdims=True)
    return f, f


def _polynomial(s, b, coefficients, causal, near):
    """``f``, and what stands in its place where the score is differentiated: ``p'`` for ``p``."""
    p = np.polynomial.Polynomial(coefficients)
    weights = np.exp(b) * (np.tri(*s.shape) if causal else 1)
    a, slope = weights * p(s), weights * p.deriv()(s)
    if near is not None:
        a, slope = (np.where(near, weights * np.exp(s), x) for x in (a, slope))
    sums = a.sum(axis=1, keepdims=True)
    return a / sums, slope / sums


def _gradients(q, k, v, dout, c, f, slope):
    out = f @ v
    e = dout @ v.T - (dout * out).sum(axis=1, keepdims=True)
    ds = slope * e
    return out, c * ds @ k, c * ds.T @ q, f.T @ dout, (f * e).sum(axis=0)


def taylor(degree):
    return [1 / math.factorial(j) for j in range(degree + 1)]


def _coefficients(engine, scores, bias):
    if engine["coefficients"] == "taylor":
        return taylor(engine["degree"])
    if engine["coefficients"] == "fitted":
        return fit(engine["degree"], scores, bias)
    return list(engine["coefficients"])


def fit(degree, scores, bias):
    """Least squares of ``p(s)`` to ``exp(s)``, each pair weighted with ``w_j / D_i``: its share of the row's error."""
    weights = np.exp(bias) / (np.exp(scores) @ np.exp(bias))[:, None]
    powers = np.stack([weights * scores**j for j in range(degree + 1)], axis=-1).reshape(-1, degree + 1)
    return np.linalg.lstsq(powers, (weights * np.exp(scores)).ravel(), rcond=None)[0]
