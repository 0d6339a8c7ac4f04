"""PyTorch's scaled_dot_product_attention by this library: exact in its place, or within a tolerance; and compiled."""

import torch

import lingrad_rs.torch as lgt

torch.manual_seed(0)
batch, heads, n, d = 1, 4, 2048, 16
q, k, v = (torch.randn(batch, heads, n, d, requires_grad=True) for _ in range(3))

want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
exact = lgt.scaled_dot_product_attention(q, k, v, is_causal=True)
print(f"exact: {(exact - want).norm() / want.norm():.1e} from PyTorch's own")

with lgt.reports() as heads_of_calls, torch.no_grad():
    # Scores of a sixteenth, so that a polynomial is enough.
    lgt.scaled_dot_product_attention(q / 4, k / 4, v, is_causal=True, tol=1e-2)
print("within 1e-2, each head by", ", ".join(head.engine_name for head in heads_of_calls[0]))

# The options beyond PyTorch's: a window of 256 tokens, and a sink for each head.
sinks = torch.zeros(heads, requires_grad=True)
out = lgt.attention(q, k, v, causal=True, window=(255, None), sinks=sinks)
out.square().mean().backward()
print(f"gradients: {q.grad.norm():.2e} of q, {sinks.grad.norm():.2e} of sinks")
