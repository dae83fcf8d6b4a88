"""Attention on TPU: a Pallas kernel that reads the interval of keys of every query, and only the blocks in it.

A block of queries holds those of all heads of its group, as rows of one matrix; it visits the blocks of keys from the
first that one of its queries sees to the last. Which these are is known before a kernel starts (scalar prefetch), so
nothing is loaded or computed for the others, be it for a window, a document, an image or a cache that is not full.
Scores lie with keys down and queries across: what there is one of for each query is then a row of lanes, in memory too.
Source: Dao 2023 (arXiv:2307.08691), with intervals for masks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma4_jax.ops.attention.spans import Spans

ROWS = 1024
"""Rows to a block of queries, of all heads of a group: as many as fit a TPU's vector memory, forward and backward."""

KEYS = 512
"""Keys to a block, where no window asks for less."""

LANES = 128
"""Of a TPU's vectors: blocks and head dims are multiples of it."""

MAX_HEAD_DIM = 512

VMEM_BYTES = 32 * 2**20
"""Vector memory that a kernel may take."""

_MASKED = -1e30


class _Plan(NamedTuple):
    """Which blocks visit which: first <= j < last. Of each row, and flat, for the scalar memory.

    Attributes:
      first_key, last_key: [B * blocks of queries] int32, the blocks of keys that a block of queries visits.
      first_query, last_query: [B * blocks of keys] int32, the blocks of queries that visit a block of keys.
    """

    first_key: jax.Array
    last_key: jax.Array
    first_query: jax.Array
    last_query: jax.Array


class Blocks(NamedTuple):
    """Queries and keys to a block."""

    queries: int
    keys: int


def block_sizes(num_queries: int, num_keys: int, group: int, back: int | None) -> Blocks:
    """The sizes of blocks.

    Args:
      num_queries, num_keys: T and S of a row.
      group: query heads to a head of keys.
      back: of the spans. A block of keys is at most half of what such a window shows a block of queries: what is
        visited in vain, at both ends of it, is as long as a block.
    """
    queries = max(LANES, ROWS // group // LANES * LANES)
    keys = KEYS if back is None else max(LANES, min(KEYS, (queries + back) // 2 // LANES * LANES))
    return Blocks(min(queries, _whole(num_queries)), min(keys, _whole(num_keys)))


def interval_attention(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
    """As `reference_attention`; cost grows with what is seen, in whole blocks, and memory as T + S.

    The backward pass computes the scores again.
    """
    b, t, n, h = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    blocks = block_sizes(t, num_keys, n // num_kv_heads, spans.back)
    fill, fill_keys = -t % blocks.queries, -num_keys % blocks.keys

    def heads_first(x: jax.Array, fill: int) -> jax.Array:
        """[B, T, N, H] -> [B, N, T', H']"""
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, fill), (0, -h % LANES)))

    start = jnp.pad(spans.start, ((0, 0), (0, fill)), constant_values=num_keys)
    stop = jnp.pad(spans.stop, ((0, 0), (0, fill)))
    plan = _plan(start, stop, (num_keys + fill_keys) // blocks.keys, blocks)
    grouped = heads_first(q, fill).reshape(b, num_kv_heads, n // num_kv_heads, t + fill, -1)
    out = _attend(
        grouped,
        heads_first(k, fill_keys),
        heads_first(v, fill_keys),
        jnp.stack([start, stop], 1)[:, None],
        plan,
        blocks,
    )
    return jnp.swapaxes(out.reshape(b, n, t + fill, -1)[:, :, :t, :h], 1, 2)


def reason_against(shape: Any, platform: str) -> str | None:
    """Why it should not compute attention of a shape, or None."""
    if platform != "tpu":
        return "it is written for TPUs"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"its heads are wider than {MAX_HEAD_DIM}"
    if shape.num_queries < LANES:
        return f"it has fewer queries than a block, which is {LANES}"
    return None


def _whole(size: int) -> int:
    """Of blocks, the smallest that holds so many."""
    return -(-size // LANES) * LANES


def _plan(start: jax.Array, stop: jax.Array, num_key_blocks: int, blocks: Blocks) -> _Plan:
    """From the spans of [B, T'] queries; those that fill the last block see nothing."""
    b = len(start)
    first = jnp.min(start.reshape(b, -1, blocks.queries), axis=2) // blocks.keys
    last = -(-jnp.max(stop.reshape(b, -1, blocks.queries), axis=2) // blocks.keys)
    j = jnp.arange(num_key_blocks, dtype=jnp.int32)
    visits = (first[..., None] <= j) & (j < last[..., None])
    i = jnp.arange(first.shape[1], dtype=jnp.int32)[:, None]
    first_query = jnp.min(jnp.where(visits, i, len(i)), axis=1)
    last_query = jnp.max(jnp.where(visits, i + 1, 0), axis=1)
    return _Plan(*(x.reshape(-1) for x in (first, last, first_query, last_query)))


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """The product of two matrices over an axis of each, in float32."""
    return jax.lax.dot_general(
        a, b, (((contracted[0],), (contracted[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _flat(q: Any) -> jax.Array:
    """[G, BQ, H] -> [R, H], the rows of a block of queries."""
    return q[...].reshape(-1, q.shape[-1])


def _across(x: Any) -> jax.Array:
    """[G, BQ] -> [1, R], one for each row of a block of queries."""
    return jnp.concatenate([x[g : g + 1] for g in range(x.shape[0])], axis=1)


def _scores(q: jax.Array, k: jax.Array, bounds: Any, j: jax.Array) -> jax.Array:
    """[R, H] queries against [BK, H] keys of block j -> [BK, R]."""
    keys = j * len(k) + jax.lax.broadcasted_iota(jnp.int32, (len(k), bounds.shape[1]), 0)
    is_seen = (keys >= bounds[0:1]) & (keys < bounds[1:2])
    bias = jnp.where(is_seen, 0.0, _MASKED)
    return _dot(k, q, (1, 1)) + jnp.concatenate([bias] * (len(q) // bounds.shape[1]), axis=1)


def _in_turns(i: Any, num_blocks: Any) -> jax.Array:
    """The block at place i of the grid: the even ones, then the odd ones.

    A chip of two cores gives half of the places to each, and the later blocks of a document see more than the first.
    """
    return jnp.where(2 * i < num_blocks, 2 * i, 2 * i - num_blocks + 1 - num_blocks % 2)


def _own() -> jax.Array:
    """The block at this place of the grid."""
    return _in_turns(pl.program_id(2), pl.num_programs(2))


def _visit(first: Any, last: Any) -> tuple[jax.Array, jax.Array]:
    """The block that a block visits at this step of the grid, and whether there is one left for it to visit."""
    own = pl.program_id(0) * pl.num_programs(2) + _own()
    j = first[own] + pl.program_id(3)
    return j, j < last[own]


def _forward_kernel(first, last, bounds, q, k, v, out, log_sum, sums, largest, total):
    """Sums are [H, R] over the keys so far, for the largest score and the total so far, both [1, R]."""

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)
        largest[...] = jnp.full_like(largest, _MASKED)
        total[...] = jnp.zeros_like(total)

    j, is_left = _visit(first, last)

    @pl.when(is_left)
    def _() -> None:
        scores = _scores(_flat(q), k[...], bounds, j)
        new_largest = jnp.maximum(largest[...], jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp(scores - new_largest)
        shrink = jnp.exp(largest[...] - new_largest)
        largest[...] = new_largest
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        sums[...] = sums[...] * shrink + _dot(v[...], weights.astype(v.dtype), (0, 0))

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        seen = jnp.maximum(total[...], 1e-30)  # of a row that is there to fill the block
        out[...] = (sums[...] / seen).T.reshape(out.shape).astype(out.dtype)
        values = largest[...] + jnp.log(seen)
        for g in range(log_sum.shape[0]):
            log_sum[g : g + 1] = values[:, g * log_sum.shape[1] : (g + 1) * log_sum.shape[1]]


def _weights_and_dscores(q, k, v, gradient, log_sum, average, bounds, j) -> tuple[jax.Array, jax.Array]:
    """Of block j of keys, [BK, R], in q's dtype.

    The gradient of a score is its weight times (what it would gain - what its row gains on average).
    """
    weights = jnp.exp(_scores(_flat(q), k[...], bounds, j) - _across(log_sum))
    dscores = weights * (_dot(v[...], _flat(gradient), (1, 1)) - _across(average))
    return weights.astype(q.dtype), dscores.astype(q.dtype)


def _query_gradient_kernel(first, last, bounds, q, gradient, log_sum, average, k, v, dq, sums):
    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    j, is_left = _visit(first, last)

    @pl.when(is_left)
    def _() -> None:
        _, dscores = _weights_and_dscores(q, k, v, gradient, log_sum, average, bounds, j)
        sums[...] += _dot(k[...], dscores, (0, 0))

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        dq[...] = sums[...].T.reshape(dq.shape).astype(dq.dtype)


def _key_gradients_kernel(first, last, k, v, bounds, q, gradient, log_sum, average, dk, dv, key_sums, value_sums):
    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    own, is_left = _own(), _visit(first, last)[1]

    @pl.when(is_left)
    def _() -> None:
        weights, dscores = _weights_and_dscores(q, k, v, gradient, log_sum, average, bounds, own)
        value_sums[...] += _dot(weights, _flat(gradient), (1, 0))
        key_sums[...] += _dot(dscores, _flat(q), (1, 0))

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        dk[...] = key_sums[...].astype(dk.dtype)
        dv[...] = value_sums[...].astype(dv.dtype)


class _Operand(NamedTuple):
    """An array as a kernel takes it, block by block.

    Attributes:
      array: [B, K or 1, ...], or what it will look like.
      axis: that is cut into blocks.
      size: of a block.
    """

    array: Any
    axis: int
    size: int

    def spec(self, block: Callable[..., Any]) -> pl.BlockSpec:
        """The blocks of one row and head; `block` is the place of one, from the grid behind these and the scalars."""
        shape = self.array.shape

        def place(row: Any, head: Any, *rest: Any) -> tuple:
            places: list[Any] = [row, head if shape[1] > 1 else 0, *(0,) * (len(shape) - 2)]
            places[self.axis] = block(row, *rest)
            return tuple(places)

        sizes: list[int | None] = [None, None, *shape[2:]]
        sizes[self.axis] = self.size
        return pl.BlockSpec(tuple(sizes), place)


def _run(
    kernel: Callable[..., None],
    visits: tuple[jax.Array, jax.Array],
    own: Sequence[_Operand],
    visited: Sequence[_Operand],
    outs: Sequence[_Operand],
    sums: Sequence[tuple[int, int]],
) -> list[jax.Array]:
    """Runs a kernel for every row, head of keys and block, once for each block that this visits.

    Args:
      kernel: of the visits, the operands, the outs and the sums.
      visits: first and last of each block, of a `_Plan`.
      own: of which it gets the block itself; the outs too.
      visited: of which it gets the block that is visited.
      sums: shapes of what is kept, in float32, from one visit of a block to the next.
    """
    first, last = visits
    b, num_kv_heads = outs[0].array.shape[:2]
    num_blocks = len(first) // b

    def itself(row: Any, i: Any, step: Any, first: Any, last: Any) -> Any:
        return _in_turns(i, num_blocks)

    def at_step(row: Any, i: Any, step: Any, first: Any, last: Any) -> Any:
        block = row * num_blocks + _in_turns(i, num_blocks)
        # The last again where there is none left: what is there is not loaded twice.
        return jnp.maximum(jnp.minimum(first[block] + step, last[block] - 1), 0)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(b, num_kv_heads, num_blocks, jnp.max(last - first)),
        in_specs=[*(x.spec(itself) for x in own), *(x.spec(at_step) for x in visited)],
        out_specs=[x.spec(itself) for x in outs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=[x.array for x in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name=kernel.__name__.strip("_"),
    )(first, last, *(x.array for x in (*own, *visited)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bounds: jax.Array, plan: _Plan, blocks: Blocks) -> jax.Array:
    return _forward(q, k, v, bounds, plan, blocks)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bounds: jax.Array, plan: _Plan, blocks: Blocks
) -> tuple[jax.Array, tuple]:
    """[B, K, G, T, H] attended, and what the backward pass needs: the log-sum-exp of each row is [B, K, G, T]."""
    num_rows, head_dim = q.shape[2] * blocks.queries, q.shape[4]
    own = [_Operand(bounds, 3, blocks.queries), _Operand(q, 3, blocks.queries)]
    outs = [
        _Operand(jax.ShapeDtypeStruct(q.shape, q.dtype), 3, blocks.queries),
        _Operand(jax.ShapeDtypeStruct(q.shape[:4], jnp.float32), 3, blocks.queries),
    ]
    sums = [(head_dim, num_rows), (1, num_rows), (1, num_rows)]
    keys = [_Operand(x, 2, blocks.keys) for x in (k, v)]
    out, log_sum = _run(_forward_kernel, (plan.first_key, plan.last_key), own, keys, outs, sums)
    out, log_sum = (checkpoint_name(x, "attended") for x in (out, log_sum))
    return out, (q, k, v, bounds, plan, out, log_sum)


def _backward(blocks: Blocks, saved: tuple, gradient: jax.Array) -> tuple:
    q, k, v, bounds, plan, out, log_sum = saved
    average = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    queries = [_Operand(x, 3, blocks.queries) for x in (bounds, q, gradient, log_sum, average)]
    keys = [_Operand(x, 2, blocks.keys) for x in (k, v)]
    num_rows, head_dim = q.shape[2] * blocks.queries, q.shape[4]
    like_q, *like_kv = (
        x._replace(array=jax.ShapeDtypeStruct(x.array.shape, x.array.dtype)) for x in (queries[1], *keys)
    )
    (dq,) = _run(
        _query_gradient_kernel, (plan.first_key, plan.last_key), queries, keys, [like_q], [(head_dim, num_rows)]
    )
    dk, dv = _run(
        _key_gradients_kernel,
        (plan.first_query, plan.last_query),
        keys,
        queries,
        like_kv,
        [(blocks.keys, head_dim)] * 2,
    )
    no_gradient: Any = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (bounds, plan))
    return dq, dk, dv, *no_gradient


_attend.defvjp(_forward, _backward)
