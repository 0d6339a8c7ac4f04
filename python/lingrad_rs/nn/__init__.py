"""Modules with a pullback, and the transformer that is made of them."""
