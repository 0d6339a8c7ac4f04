"""Trains a small transformer on a text by gradient descent, every gradient by low-rank attention."""

import numpy as np

import lingrad_rs as lg

text = np.frombuffer(b"to be, or not to be, that is the question. " * 30, np.uint8)
tokens, targets = text[:-1], text[1:]

config = lg.TransformerConfig(
    n_layers=2, d_model=32, n_heads=2, d_ff=64, vocab_size=128, engine=lg.Polynomial(degree=2)
)
params = dict(lg.Transformer(config, seed=0).params)
momentum = {name: np.zeros_like(w) for name, w in params.items()}
for step in range(41):
    loss, grads = lg.Transformer(config, params).value_and_grad(tokens, targets)
    if step % 10 == 0:
        print(f"step {step:2}: {loss:.3f} nats a byte")
    norm = np.sqrt(sum(float(np.sum(g * g)) for g in grads.values()))
    for name, grad in grads.items():
        momentum[name] = 0.9 * momentum[name] + grad * min(1, 1 / norm)
        params[name] = params[name] - 0.1 * momentum[name]
