"""Attention and its gradient by an engine of one's own choice, and how far they are from the exact ones."""

import numpy as np

import lingrad_rs as lg

rng = np.random.default_rng(0)
heads, n, d = 4, 4096, 16
q, k, v, dout = (rng.standard_normal((heads, n, d), dtype=np.float32) for _ in range(4))
q, k = q / 2, k / 2  # scores of standard deviation 1/4

out, vjp = lg.attention_vjp(q, k, v, engine=lg.Polynomial(degree=2, coefficients="fitted"), causal=True)
dq, dk, dv = vjp(dout, samples=128)  # 128 queries and keys of each head are also computed exactly
for i, head in enumerate(vjp.heads):
    errors = ", ".join(f"{name} {e.relative:.1e} (at most {e.high:.1e})" for name, e in head.errors.items())
    print(f"head {i}, {head.engine_name}: {errors}")

exact = lg.attention(q, k, v, engine=lg.Exact(), causal=True)
print(f"out, held against all of exact attention: {np.linalg.norm(out - exact) / np.linalg.norm(exact):.1e}")
