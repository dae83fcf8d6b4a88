"""Rows of an embedding table that is spread over a mesh, with a gradient that is never whole on any device."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma4_jax.sharding import BATCH_AXES

_IDS = P(BATCH_AXES, "context")


class _Table(NamedTuple):
    """What the backward pass knows of a table, which it does not keep."""

    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def spec(self) -> P:
        """Vocabulary over `tensor`, channels over `fsdp`, as `sharding` spreads "vocab" and the widths."""
        return P("tensor", *[None] * (len(self.shape) - 2), "fsdp")


def look_up(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """table[ids], in `dtype`.

    The partitioner makes the gradient of a plain gather whole on every device, however the table is spread. Inside a
    mesh this is a `jax.shard_map`: a device is told the ids of all rows of its `fsdp` group, looks up its own channels
    of its own part of the vocabulary, and the rows go home by an all-to-all. The gradient takes the same way back and
    is added up, in float32, in the part that the device holds. Either way a device sends about the bytes of its rows.

    Args:
      table: [V, ..., W].
      ids: [B, T] int32, or of any shape outside of a mesh, and where the mesh does not divide rows, positions or table.
      dtype: of the result.
    Returns:
      [*ids, ..., W].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not _divides(mesh.shape, table, ids):
        return table[ids].astype(dtype)
    return _look_up(table, ids, dtype, _Table(table.shape, table.dtype))


def _divides(mesh: dict[str, int], table: jax.Array, ids: jax.Array) -> bool:
    """Whether every device has as much of the table, and of the ids, as any other."""
    if ids.ndim != 2:
        return False
    shards = math.prod(mesh[axis] for axis in BATCH_AXES), mesh["context"], mesh["tensor"], mesh["fsdp"]
    return all(size % n == 0 for size, n in zip((*ids.shape, table.shape[0], table.shape[-1]), shards, strict=True))


def _own_places(ids: jax.Array, size: int) -> jax.Array:
    """Places of the ids of the whole `fsdp` group in this device's part of the vocabulary; `size` for other parts."""
    places = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True).reshape(-1) - jax.lax.axis_index("tensor") * size
    return jnp.where((places >= 0) & (places < size), places, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table: jax.Array, ids: jax.Array, dtype: jnp.dtype, layout: _Table) -> jax.Array:
    def on_shard(table: jax.Array, ids: jax.Array) -> jax.Array:
        # As a matrix: a TPU pads the last two axes of an array, and would pad few channels of many layers fourfold.
        matrix = table.reshape(len(table), -1)
        rows = matrix.at[_own_places(ids, len(table))].get(mode="fill", fill_value=0).astype(dtype)
        rows = jax.lax.psum(rows, "tensor")
        rows = rows.reshape(-1, ids.shape[1], *table.shape[1:])
        return jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=rows.ndim - 1, tiled=True)

    return jax.shard_map(on_shard, in_specs=(layout.spec, _IDS), out_specs=_IDS, check_vma=False)(table, ids)


def _forward(table: jax.Array, ids: jax.Array, dtype: jnp.dtype, layout: _Table) -> tuple[jax.Array, jax.Array]:
    return _look_up(table, ids, dtype, layout), ids


def _backward(dtype: jnp.dtype, layout: _Table, ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array, np.ndarray]:
    def on_shard(ids: jax.Array, gradient: jax.Array) -> jax.Array:
        rows = jax.lax.all_to_all(gradient, "fsdp", split_axis=gradient.ndim - 1, concat_axis=0, tiled=True)
        size = layout.shape[0] // jax.lax.axis_size("tensor")
        own = jnp.zeros((size, math.prod(rows.shape[2:])), jnp.float32)
        own = own.at[_own_places(ids, size)].add(rows.reshape(-1, own.shape[1]).astype(jnp.float32), mode="drop")
        own = jax.lax.psum(own, ("data", "expert", "context"))
        return own.reshape(size, *rows.shape[2:]).astype(layout.dtype)

    of_table = jax.shard_map(on_shard, in_specs=(_IDS, _IDS), out_specs=layout.spec, check_vma=False)(ids, gradient)
    return of_table, np.zeros(ids.shape, jax.dtypes.float0)


_look_up.defvjp(_forward, _backward)
