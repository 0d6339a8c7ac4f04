"""Arrays that lie on several devices: each device attends to its own batch entries and heads.

A call of the host is not split by XLA. Inside ``jax.shard_map`` there is nothing to split; where the mesh has explicit
axes, the types of arrays say how they lie, and `over_shards` is that ``shard_map``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

__all__ = ["over_shards", "same_varying_axes", "varying_like"]


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a mesh over which an array varies, inside ``jax.shard_map``."""
    kind = jax.typeof(x)
    axes = getattr(kind, "vma", None)  # its name until JAX 0.9
    return kind.manual_axis_type.varying if axes is None else axes


def same_varying_axes(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays, varying over the same axes of a mesh; what did not is summed over them in the gradient."""
    axes: frozenset[str] = frozenset().union(*map(varying_axes, arrays.values()))
    return {name: _varying(x, axes - varying_axes(x)) for name, x in arrays.items()}


def varying_like(x: Any, results: Any) -> Any:
    """Results of the host, which are the same on all devices to JAX, varying over the axes over which ``x`` does."""
    return jax.tree.map(lambda y: _varying(y, varying_axes(x) - varying_axes(y)), results)


def _varying(x: Any, axes: frozenset[str]) -> Any:
    if not axes:
        return x
    names = tuple(sorted(axes))
    # JAX 0.6 has the older name.
    return jax.lax.pcast(x, names, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, names)


def over_shards(attend: Callable[[dict[str, Any]], tuple[Any, Any]], arrays: dict[str, Any]) -> tuple[Any, Any]:
    """``attend(arrays)``, by each device on its own part where the types of arrays say how they are spread."""
    sharding = jax.typeof(arrays["query"]).sharding
    mesh = sharding.mesh
    explicit = not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)
    if not explicit or not hasattr(jax.sharding, "reshard"):  # which JAX 0.6 does not have
        return attend(arrays)
    batch, _, heads, _ = (*sharding.spec, *(None,) * (4 - len(sharding.spec)))
    if heads is not None and arrays["key"].shape[2] % _size(mesh, heads):
        heads = None  # a part of the query heads would need a part of a key head
    specs = {name: _spec(name, x.shape, batch, heads) for name, x in arrays.items()}
    arrays = {name: jax.sharding.reshard(x, specs[name]) for name, x in arrays.items()}
    results = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, heads, None)
    return jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=results)(arrays)


def _spec(name: str, shape: tuple[int, ...], batch: Any, heads: Any) -> PartitionSpec:
    batch = None if shape[0] == 1 else batch
    if name in ("query", "key", "value"):
        return PartitionSpec(batch, None, heads, None)
    if name in ("bias", "mask"):
        return PartitionSpec(batch, None if shape[1] == 1 else heads, None, None)
    return PartitionSpec(batch, *(None,) * (len(shape) - 1))


def _size(mesh: Any, axes: Any) -> int:
    size = 1
    for axis in axes if isinstance(axes, tuple) else (axes,):
        size *= mesh.shape[axis]
    return size
