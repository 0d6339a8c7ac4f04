"""Attention for PyTorch and for Hugging Face's models; ``import lingrad_rs`` never imports this."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "lingrad_rs.torch needs PyTorch, which is not installed: pip install 'lingrad_rs[torch]'", name="torch"
    ) from error

from .functional import attention, scaled_dot_product_attention
from .hugging_face import register_hugging_face
from .reports import reports

__all__ = ["attention", "register_hugging_face", "reports", "scaled_dot_product_attention"]
