"""Grouped matmul: rows sorted by group, and one matrix for each group. No row meets another group's matrix.

`jax.lax.ragged_dot` is differentiated by a dense masked product on most platforms, whose cost is E times the work. So
the gradients are written here, each as the grouped product that it is.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.ops.grouped_mosaic_gpu import mosaic_gpu_multiply, mosaic_gpu_outer

BLOCKS = (256, 64, 32)
"""Rows of a block: a group takes as many of the largest as it fills, then of each that is smaller, so that fewer than
the least number of rows only fill its last block. One of the least that is all the rest joins one of the largest: a
block of few rows costs more than its rows, and an even load is about a power of two, often a little more."""

TILE_ROWS = 128
"""Rows of a tile on TPU, those of its matrix unit. A tile that two groups share is computed for both."""

TILE_BYTES = 9 * 2**20
"""Fast memory for one matrix's tile and the next one's, of the 16 MiB that a kernel may use on TPU v5p."""


def sort_by_group(groups: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """Order that sorts by group, and each group's size.

    Args:
      groups: [R] int32; those outside of [0, num_groups) belong to nobody and sort behind all others.
      num_groups: E.
    Returns:
      ([R] int32 indices, [E] int32 sizes).
    """
    groups = jnp.where((groups >= 0) & (groups < num_groups), groups, num_groups)
    sizes = jnp.bincount(groups, length=num_groups + 1)[:num_groups].astype(jnp.int32)
    return jnp.argsort(groups, stable=True).astype(jnp.int32), sizes


def grouped(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, *, implementation: str) -> jax.Array:
    """Each row times the matrix of its group; sums in float32, those of the weight's gradient too.

    Args:
      rows: [R, K] sorted by group. What stands behind the last group is never read, here or in the backward pass.
      weight: [E, K, N] in rows' dtype.
      group_sizes: [E] int32, their sum at most R; a group may be empty.
      implementation: a key of IMPLEMENTATIONS.
    Returns:
      [R, N] in rows' dtype; zero behind the last group, and so are the gradients of those rows.
    """
    return _grouped(rows, weight, group_sizes, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, implementation: str) -> jax.Array:
    return _multiply(rows, weight, group_sizes, implementation, transposed=False)


def _multiply(
    rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, implementation: str, *, transposed: bool
) -> jax.Array:
    out = IMPLEMENTATIONS[implementation].multiply(rows, weight, group_sizes, transposed)
    return jnp.where(_is_in_group(len(rows), group_sizes), out, 0)


def _forward(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, implementation: str) -> tuple:
    return _grouped(rows, weight, group_sizes, implementation), (rows, weight, group_sizes)


def _backward(implementation: str, saved: tuple, gradient: jax.Array) -> tuple:
    rows, weight, group_sizes = saved
    to_rows = _multiply(gradient, weight, group_sizes, implementation, transposed=True)
    to_weight = IMPLEMENTATIONS[implementation].outer(rows, gradient, group_sizes).astype(weight.dtype)
    return to_rows, to_weight, np.zeros(group_sizes.shape, jax.dtypes.float0)


_grouped.defvjp(_forward, _backward)


def visit_blocks(start: jax.Array, stop: jax.Array, visit: Callable[..., Any], carry: Any, *, num_rows: int) -> Any:
    """visit(first row of a block, its number of rows, carry) -> carry, for blocks from `start` until `stop` is reached.

    The last block ends less than BLOCKS[-1] rows behind `stop`. `num_rows` is the most that there can be.
    """
    at, left = start, stop - start + BLOCKS[-1] - 1
    joined = BLOCKS[0] + BLOCKS[-1]
    for block in (block for block in (joined, *BLOCKS) if block < max(num_rows, 1) + BLOCKS[-1]):
        count = left // block
        if block == joined:
            count = jnp.where(left % BLOCKS[0] // BLOCKS[-1] == 1, jnp.minimum(count, 1), 0)
        step = functools.partial(_step, at, block, visit)
        carry = jax.lax.fori_loop(0, count, step, carry)
        at, left = at + count * block, left - count * block
    return carry


def _step(start: jax.Array, block: int, visit: Callable[..., Any], i: jax.Array, carry: Any) -> Any:
    return visit(start + i * block, block, carry)


def to_float32(*matrices: jax.Array) -> tuple[jax.Array, ...]:
    """Matrices in float32, converted here and now: not in every block, and not within the matmul, which is slow."""
    return jax.lax.optimization_barrier(tuple(matrix.astype(jnp.float32) for matrix in matrices))


def to_bits(x: jax.Array) -> jax.Array:
    """Numbers of two bytes as integers, others as they are. On CPU, XLA writes a slice of a bfloat16 array by
    converting all of it to float32 and back; integers it writes in place. Either way the bytes are copied once."""
    return x if x.dtype.itemsize > 2 else jax.lax.bitcast_convert_type(x, jnp.uint16)


def from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The numbers again."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def multiply(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product of two matrices over an axis of each."""
    return jax.lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())))


def _blocks_multiply(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    """A matmul for each block of a group's rows. The rows that fill a group's last block are the next group's, whose
    own products are then written over theirs."""
    num_rows, width, ends = len(rows), weight.shape[1 if transposed else 2], jnp.cumsum(group_sizes)
    rows = jnp.pad(rows, ((0, BLOCKS[-1]), (0, 0)))

    def visit_group(out: jax.Array, group: tuple) -> tuple[jax.Array, None]:
        matrix, size, end = group
        (matrix,) = to_float32(from_bits(matrix, weight.dtype))

        def visit(at: jax.Array, block: int, out: jax.Array) -> jax.Array:
            own = jax.lax.dynamic_slice_in_dim(rows, at, block)
            product = multiply(own.astype(jnp.float32), matrix, (1, 1 if transposed else 0))
            return jax.lax.dynamic_update_slice_in_dim(out, to_bits(product.astype(rows.dtype)), at, 0)

        return visit_blocks(end - size, end, visit, out, num_rows=num_rows), None

    nothing = to_bits(jnp.zeros((len(rows), width), rows.dtype))
    out, _ = jax.lax.scan(visit_group, nothing, (to_bits(weight), group_sizes, ends))
    return from_bits(out[:num_rows], rows.dtype)


def _blocks_outer(rows: jax.Array, gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    num_rows, ends = len(rows), jnp.cumsum(group_sizes)
    rows, gradient = (jnp.pad(x, ((0, BLOCKS[-1]), (0, 0))) for x in (rows, gradient))

    def visit_group(_: None, group: tuple) -> tuple[None, jax.Array]:
        size, end = group

        def visit(at: jax.Array, block: int, total: jax.Array) -> jax.Array:
            is_own = (at + jnp.arange(block) < end)[:, None]
            own, to_own = (jnp.where(is_own, jax.lax.dynamic_slice_in_dim(x, at, block), 0) for x in (rows, gradient))
            return total + multiply(own.astype(jnp.float32), to_own.astype(jnp.float32), (0, 0))

        nothing = jnp.zeros((rows.shape[1], gradient.shape[1]), jnp.float32)
        return None, to_bits(visit_blocks(end - size, end, visit, nothing, num_rows=num_rows).astype(rows.dtype))

    return from_bits(jax.lax.scan(visit_group, None, (group_sizes, ends))[1], rows.dtype)


def _ragged_multiply(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    is_row = _is_in_group(len(rows), group_sizes)
    weight = jnp.swapaxes(weight, 1, 2) if transposed else weight
    return jax.lax.ragged_dot(jnp.where(is_row, rows, 0), weight, group_sizes)


def _ragged_outer(rows: jax.Array, gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    is_row = _is_in_group(len(rows), group_sizes)
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    rows, gradient = (jnp.where(is_row, x, 0) for x in (rows, gradient))
    return jax.lax.ragged_dot_general(rows, gradient, group_sizes, numbers, preferred_element_type=jnp.float32)


def _megablox_multiply(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # a third of a second, for nothing on other platforms

    inner, width = weight.shape[1:][:: -1 if transposed else 1]
    tiling = (TILE_ROWS, *matrix_tile(inner, width, weight.dtype.itemsize))
    return gmm(_whole_tiles(rows), weight, group_sizes, rows.dtype, tiling, transpose_rhs=transposed)[: len(rows)]


def _megablox_outer(rows: jax.Array, gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    # The kernel masks what it reads, and visits a group without rows to write its zeros.
    tiling = (TILE_ROWS, *matrix_tile(rows.shape[1], gradient.shape[1], 4, whole=1))
    return tgmm(_whole_tiles(rows).T, _whole_tiles(gradient), group_sizes, rows.dtype, tiling)


def matrix_tile(height: int, width: int, itemsize: int, *, whole: int = 0) -> tuple[int, int]:
    """Shape of the tiles of a [height, width] matrix: one of its axes stays whole, so that it is read once a group.

    Tiles are multiples of 128, or an axis of the matrix; of those that fit, the ones that fill the matrix best, and
    of those the largest.

    Args:
      height, width: of the matrix.
      itemsize: bytes of an entry.
      whole: the axis that stays whole.
    """
    fixed, cut = (height, width) if whole == 0 else (width, height)
    fitting = [size for size in (cut, *range(128, cut, 128)) if fixed * size * itemsize <= TILE_BYTES // 2] or [128]
    best = min(fitting, key=lambda size: (-(-cut // size) * size > 1.1 * cut, -size))
    return (fixed, best) if whole == 0 else (best, fixed)


def _whole_tiles(rows: jax.Array) -> jax.Array:
    return jnp.pad(rows, ((0, -len(rows) % TILE_ROWS), (0, 0)))


def _is_in_group(num_rows: int, group_sizes: jax.Array) -> jax.Array:
    """[R, 1] bool, False behind the last group."""
    return (jnp.arange(num_rows) < jnp.sum(group_sizes))[:, None]


class Implementation(NamedTuple):
    """A way to compute the products.

    Attributes:
      multiply: (rows [R, K], weight [E, K, N], sizes [E], transposed) -> [R, N]; transposed: of [R, N] to [R, K]. What
        it gives behind the last group may be anything.
      outer: (rows [R, K], gradient [R, N], sizes [E]) -> [E, K, N], a group's rows times the gradients of its products.
    """

    multiply: Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]
    outer: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


IMPLEMENTATIONS = {
    "blocks": Implementation(_blocks_multiply, _blocks_outer),
    "ragged": Implementation(_ragged_multiply, _ragged_outer),
    "megablox": Implementation(_megablox_multiply, _megablox_outer),
    "mosaic_gpu": Implementation(mosaic_gpu_multiply, mosaic_gpu_outer),
}
"""Name -> implementation: loops of plain matmuls, for every platform; `jax.lax.ragged_dot`; JAX's kernels for TPU;
tokamax's for Hopper GPUs."""
