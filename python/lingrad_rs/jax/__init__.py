"""Attention for JAX: `jax.nn.dot_product_attention`, computed by this library on the CPU.

JAX calls the host for it, by ``jax.pure_callback``: arrays are read where XLA has them, in JAX's layout, and results
are copied once into XLA's memory. ``import lingrad_rs`` does not import this module, nor JAX.
"""

from __future__ import annotations

from .attention import dot_product_attention

__all__ = ["dot_product_attention"]
