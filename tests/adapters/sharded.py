"""Attention of arrays on four devices, two by two over batch and heads; run by `test_jax`, with that many devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lingrad_rs as lg
import lingrad_rs.jax as lgj

SPREAD = PartitionSpec("batch", None, "heads", None)
MASKS = PartitionSpec(None, "heads", None, None)
seen = []
attention, attention_backward = lg.attention, lg.attention_backward


def spy(q, *others, **options):
    seen.append(q.shape)
    return attention(q, *others, **options)


def spy_backward(dout, q, *others, **options):
    seen.append(q.shape)
    return attention_backward(dout, q, *others, **options)


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(kind, kind))


def loss(attend):
    return lambda *arrays: jnp.sin(attend(*arrays)).sum()


def gradients(attend, arrays):
    return jax.jit(jax.grad(loss(attend), argnums=(0, 1, 2, 3)))(*arrays)


def causal(attend):
    return lambda *arrays: attend(*arrays, is_causal=True)


def check(name, got, want, shapes):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)
    assert set(seen) == shapes, f"{name}: {seen}"
    seen.clear()


def main():
    lg.attention, lg.attention_backward = spy, spy_backward
    rng = np.random.default_rng(0)
    shapes = [(4, 5, 4, 8), (4, 7, 2, 8), (4, 7, 2, 8), (1, 4, 5, 7)]
    arrays = [jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes]
    want = gradients(causal(jax.nn.dot_product_attention), arrays)
    ours = causal(lgj.dot_product_attention)
    part, whole = {(2, 2, 5, 8)}, {(4, 4, 5, 8)}

    mesh = mesh_of(AxisType.Auto)
    split = jax.shard_map(ours, mesh=mesh, in_specs=(SPREAD,) * 3 + (MASKS,), out_specs=SPREAD)
    check("shard_map", gradients(split, arrays), want, part)

    spread = [jax.device_put(x, NamedSharding(mesh, SPREAD)) for x in arrays[:3]]
    check("automatic axes, gathered", gradients(ours, [*spread, arrays[3]]), want, whole)

    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        spread = [jax.device_put(x, SPREAD) for x in arrays[:3]]
        grads = gradients(ours, [*spread, jax.device_put(arrays[3], PartitionSpec())])
        assert all(x.sharding.spec == SPREAD for x in grads[:3])
        check("explicit axes", grads, want, part)

        # One key head cannot be split between devices: the batch alone is.
        key, value = (x[:, :, :1] for x in arrays[1:3])
        over_batch = PartitionSpec("batch")
        mixed = [spread[0], jax.device_put(key, over_batch), jax.device_put(value, over_batch)]
        grads = gradients(ours, [*mixed, jax.device_put(arrays[3], PartitionSpec())])
        wanted = gradients(causal(jax.nn.dot_product_attention), [arrays[0], key, value, arrays[3]])
        check("one key head", grads, wanted, {(2, 4, 5, 8)})


if __name__ == "__main__":
    main()
