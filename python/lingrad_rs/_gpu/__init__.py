"""The backend of CuPy arrays, with the functions of `_cpu`.

It is written to the Python array API standard, so that all of its logic also runs, and is tested, on the CPU. Work is
done in batched matrix products over chunks of tokens and heads that fit in the device's free memory; nothing waits for
the device but the checks of inputs and results, draws of samples, and reports.
"""

from . import attention
from .device import run


def attention_forward(q, k, v, key_bias, **o):
    return run(q, lambda sp: attention.forward(sp, q, k, v, key_bias, **o))


def attention_backward(q, k, v, key_bias, state, dout, **o):
    return run(q, lambda sp: attention.backward(sp, q, k, v, key_bias, state, dout, **o))
