"""Grouped matmul on Hopper GPUs: tokamax's kernels, for the rows and for the gradient of the weights.

Their gradient of an empty group's weight is zero, as it must be; that of tokamax's kernels in Triton is not. On
Blackwell tokamax has no such product. No GPU has run this, so "auto" does not take it. What has been seen, without one:
that all three products lower for Hopper, and what the kernels compute when they are interpreted
(tests/ops/test_grouped_mosaic_gpu.py).
"""

import jax
import jax.numpy as jnp

from gemma4_jax.errors import InputError
from gemma4_jax.ops.hopper import keep_flags

TILE = 128
"""Rows and columns that a block of threads computes, whose sums take half of its registers."""

STEP = 64
"""Length of a step along the inner axis. What is left of the axis behind its last step the kernels leave out."""

STAGES = 3
"""Steps that are in shared memory at once: 96 KiB, so that there is room for two blocks of threads."""

ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
OUTER = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def mosaic_gpu_multiply(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    """As `Implementation.multiply` of `ops.grouped`, in bfloat16.

    Raises:
      InputError: rows are not in bfloat16, or the GPU is of another generation.
    """
    weight = jnp.swapaxes(weight, 1, 2) if transposed else weight  # as tokamax does: a copy
    out = _compute(_fill(rows, TILE, STEP), _fill(weight, 1, STEP, STEP), group_sizes, ROWS)
    return out[: len(rows), : weight.shape[2]]


def mosaic_gpu_outer(rows: jax.Array, gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """As `Implementation.outer`; a group that has what is no number, or infinite, gets no number anywhere."""
    num_groups = len(group_sizes)
    # The kernel multiplies a neighbour's rows that stand in the same step by zero, and 0 * nan is nan.
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(rows)), side="right")
    is_row = (group < num_groups)[:, None]
    is_bad = ~jnp.all(jnp.isfinite(rows), axis=1) | ~jnp.all(jnp.isfinite(gradient), axis=1)
    is_spoilt = jnp.zeros(num_groups, bool).at[group].max(is_bad, mode="drop")
    a, b = (_fill(jnp.where(is_row & jnp.isfinite(x), x, 0), STEP, STEP) for x in (rows, gradient))
    out = _compute(a, b, group_sizes, OUTER)[:, : rows.shape[1], : gradient.shape[1]]
    return jnp.where(is_spoilt[:, None, None], jnp.nan, out)


def _fill(x: jax.Array, *multiples: int) -> jax.Array:
    """Zeros behind the end of each axis, up to a multiple."""
    return jnp.pad(x, [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)])


def _compute(
    a: jax.Array, b: jax.Array, group_sizes: jax.Array, numbers: jax.lax.RaggedDotDimensionNumbers
) -> jax.Array:
    # It is an extra, and takes seconds to import.
    from tokamax._src import gpu_utils
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu as kernels

    if a.dtype != jnp.bfloat16:
        raise InputError(f"train.experts='mosaic_gpu' computes in bfloat16: train.compute_dtype cannot be {a.dtype}.")
    if not gpu_utils.is_sm90():
        raise InputError("train.experts='mosaic_gpu' is written for Hopper GPUs, and this is none: it must be auto.")
    keep_flags()
    ((inner,), _), _ = numbers.dot_dimension_numbers
    height, width = (TILE if size % TILE == 0 else STEP for size in (a.shape[1 - inner], b.shape[-1]))
    tiles = {"block_m": height, "block_n": width, "block_k": STEP, "num_stages": STAGES, "split_k": 1}
    config = kernels.Config(**tiles, warp_specialized=False, persistent=False)
    dot = kernels.PallasMosaicGpuRaggedDot(config=config)
    return dot(a, b, group_sizes=group_sizes, ragged_dot_dimension_numbers=numbers)
