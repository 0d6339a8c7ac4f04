"""A chain of modules, one of them one's own, and a loss of one's own: every gradient by one pullback."""

import numpy as np

import lingrad_rs as lg


class Scale:
    """``y = s x``: any object with this method is a module."""

    def __init__(self, s: float) -> None:
        self.s = np.float64(s)

    def vjp(self, x):
        def pullback(dy):
            return self.s * dy, {"s": np.sum(dy * x)}

        return self.s * x, pullback


rng = np.random.default_rng(0)
n, d = 512, 16
w, w_v = (rng.standard_normal((d, d)) / d for _ in range(2))
attention = lg.SelfAttention(w=w, w_v=w_v, causal=True, engine=lg.Polynomial(degree=4))
chain = lg.Chain([lg.RMSNorm(gain=np.ones(d)), Scale(0.5), lg.Residual(attention), lg.Activation("silu")])

x, target = rng.standard_normal((2, n, d))
y, pullback = chain.vjp(x)
loss, dy = 0.5 * np.mean((y - target) ** 2), (y - target) / y.size
dx, grads = pullback(dy)
print(f"loss {loss:.4f}, gradient of the input {np.linalg.norm(dx):.2e}")
for module, of_module in zip(chain.modules, grads, strict=True):
    norms = {name: f"{np.linalg.norm(grad):.2e}" for name, grad in of_module.items()}
    print(f"{type(module).__name__:>12}: {norms or 'no parameters'}")
