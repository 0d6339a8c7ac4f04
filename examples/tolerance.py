"""A tolerance in place of an engine: what is chosen, why, and a plan that is kept and used again."""

import numpy as np

import lingrad_rs as lg


def sequence(seed: int, n: int = 16384, d: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two heads: one near a curve, as positions and smooth signals are, the other spread in all directions."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 2 * np.pi, n)[:, None] * np.arange(1, d + 1)
    curve = np.cos(t + rng.uniform(0, 2 * np.pi, d)) / np.arange(1, d + 1)
    spread = rng.standard_normal((2, n, d))
    q, k = (np.stack([2 * curve, x]).astype(np.float32) for x in spread)
    return q, k, rng.standard_normal((2, n, d), dtype=np.float32)


plan = lg.plan_attention(*sequence(seed=0), tol=1e-2, gradients=False)
print(plan)

text = plan.to_json()  # to be kept; every number is there to the last bit
again = lg.Plan.from_json(text)
out = again.attention(*sequence(seed=1))  # other data of the same kind; verified, and exact where the plan misses
print(f"used again on other data: {out.shape}, from a plan of {len(text):,} bytes")
