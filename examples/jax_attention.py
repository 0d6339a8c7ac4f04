"""Attention in a JAX model: the function of jax.nn, computed here, under jit and grad; and within a tolerance."""

import jax
import jax.numpy as jnp
import numpy as np

import lingrad_rs.jax as lgj

rng = np.random.default_rng(0)
batch, tokens, heads, width = 2, 512, 4, 16
x = jnp.asarray(rng.standard_normal((batch, tokens, heads, width)), "float32")
weights = {name: jnp.asarray(rng.standard_normal((width, width)) / width, "float32") for name in ("q", "k", "v")}


def loss(weights, attend, **options):
    out = attend(x @ weights["q"], x @ weights["k"], x @ weights["v"], is_causal=True, **options)
    return (out**2).mean()


theirs = jax.jit(jax.grad(lambda weights: loss(weights, jax.nn.dot_product_attention)))(weights)
for options in ({}, {"tol": 1e-2}):
    ours = jax.jit(jax.grad(lambda weights, options=options: loss(weights, lgj.dot_product_attention, **options)))(
        weights
    )
    errors = {name: float(jnp.linalg.norm(ours[name] - y) / jnp.linalg.norm(y)) for name, y in theirs.items()}
    print(options or "exact", "differs from jax.nn by", ", ".join(f"{name} {e:.1e}" for name, e in errors.items()))
