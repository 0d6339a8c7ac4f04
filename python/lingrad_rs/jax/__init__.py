"""Attention for JAX: `jax.nn.dot_product_attention`, computed by this library on the CPU.

JAX calls the host for it, by ``jax.pure_callback``, which copies each array once, in and out; nothing more is copied,
as the library reads JAX's layout. ``import lingrad_rs`` imports neither this module nor JAX.
"""

from __future__ import annotations

from .attention import dot_product_attention

__all__ = ["dot_product_attention"]
