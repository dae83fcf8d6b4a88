"""Attention block by block: no more than a block of scores exists, and blocks that nobody sees are not visited.

All rows are one long sequence here, in which the spans keep them apart as they keep documents apart: a block of queries
visits the blocks of keys from the first that one of its queries sees to the last.
Source: Rabe and Staats 2021 (arXiv:2112.05682) and Dao 2023 (arXiv:2307.08691), with intervals for masks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gemma4_jax.ops.attention.spans import Spans

BLOCK = 64
"""Queries, and keys, to a block of a short row."""

_MASKED = -1e30


class _Plan(NamedTuple):
    """Spans of all rows in a sequence, block by block.

    Attributes:
      start, stop: [blocks, BLOCK] int32, the keys that each query sees; none for what fills the last block.
      first, last: [blocks] int32, the blocks of keys first <= j < last that a block of queries visits.
    """

    start: jax.Array
    stop: jax.Array
    first: jax.Array
    last: jax.Array


def blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
    """As `reference_attention`; cost grows with what is seen, in whole blocks, and memory as T + S.

    The backward pass computes the scores again.
    """
    b, t, n, h = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    rows = jnp.arange(b, dtype=jnp.int32)[:, None] * num_keys
    start = _blocks((spans.start + rows).reshape(-1), fill=b * num_keys)
    stop = _blocks((spans.stop + rows).reshape(-1), fill=0)
    plan = _Plan(start, stop, jnp.min(start, axis=1) // BLOCK, -(-jnp.max(stop, axis=1) // BLOCK))
    out = _attend(_in_blocks(q, num_kv_heads), _in_blocks(k, num_kv_heads), _in_blocks(v, num_kv_heads), plan)
    out = out.reshape(-1, num_kv_heads, BLOCK, n // num_kv_heads, h)
    return jnp.swapaxes(out, 1, 2).reshape(-1, n, h)[: b * t].reshape(b, t, n, h)


def reason_against(shape: Any, platform: str) -> str | None:
    """Why it should not compute attention of a shape, or None."""
    if shape.num_queries < BLOCK:
        return f"it has fewer queries than a block, which is {BLOCK}"
    return None


def _blocks(x: jax.Array, fill: int) -> jax.Array:
    """[n, ...] -> [blocks, BLOCK, ...], the last block filled up."""
    padding = ((0, -len(x) % BLOCK), *((0, 0),) * (x.ndim - 1))
    return jnp.pad(x, padding, constant_values=fill).reshape(-1, BLOCK, *x.shape[1:])


def _in_blocks(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [blocks, K, BLOCK * G, H]: the queries of a group are rows of one matrix."""
    blocks = _blocks(x.reshape(-1, num_kv_heads, x.shape[2] // num_kv_heads, x.shape[3]), fill=0)
    return jnp.swapaxes(blocks, 1, 2).reshape(len(blocks), num_kv_heads, -1, x.shape[3])


def _scores(q: jax.Array, k: jax.Array, j: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """[K, R, H] rows of queries against [K, BLOCK, H] keys of block j -> [K, R, BLOCK] float32."""
    scores = jnp.einsum("krh,ksh->krs", q, k, preferred_element_type=jnp.float32)
    keys = j * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    is_seen = (keys >= start[:, None]) & (keys < stop[:, None])
    return jnp.where(jnp.repeat(is_seen, q.shape[1] // BLOCK, axis=0), scores, _MASKED)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan) -> jax.Array:
    return _forward(q, k, v, plan)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan) -> tuple[jax.Array, tuple]:
    """[blocks, K, R, H] attended, and what the backward pass needs: the log-sum-exp of each row is [blocks, K, R]."""

    def attend_block(scanned: tuple) -> tuple[jax.Array, jax.Array]:
        q, plan = scanned

        def visit(j: jax.Array, carry: tuple) -> tuple:
            largest, total, out = carry
            scores = _scores(q, k[j], j, plan.start, plan.stop)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            out = out * shrink[..., None] + jnp.einsum(
                "krs,ksh->krh", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32
            )
            return new_largest, total * shrink + jnp.sum(weights, axis=-1), out

        rows = q.shape[:2]
        nothing = jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32)
        largest, total, out = jax.lax.fori_loop(plan.first, plan.last, visit, nothing)
        total = jnp.maximum(total, 1e-30)  # of a row that is there to fill the block
        return (out / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    out, log_sum = jax.lax.map(attend_block, (q, plan))
    out, log_sum = (checkpoint_name(x, "attended") for x in (out, log_sum))
    return out, (q, k, v, plan, out, log_sum)


def _backward(saved: tuple, gradient: jax.Array) -> tuple:
    q, k, v, plan, out, log_sum = saved
    # The gradient of a score is its weight times (what it would gain - what its row gains on average).
    average = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend_block(carry: tuple, scanned: tuple) -> tuple[tuple, jax.Array]:
        q, gradient, log_sum, average, plan = scanned

        def visit(j: jax.Array, carry: tuple) -> tuple:
            dq, dk, dv = carry
            weights = jnp.exp(_scores(q, k[j], j, plan.start, plan.stop) - log_sum[..., None])
            gains = einsum("krh,ksh->krs", gradient, v[j])
            dscores = (weights * (gains - average[..., None])).astype(q.dtype)
            dv = dv.at[j].add(einsum("krs,krh->ksh", weights.astype(q.dtype), gradient))
            dk = dk.at[j].add(einsum("krs,krh->ksh", dscores, q))
            return dq + einsum("krs,ksh->krh", dscores, k[j]), dk, dv

        dq, *carry = jax.lax.fori_loop(plan.first, plan.last, visit, (jnp.zeros(q.shape, jnp.float32), *carry))
        return tuple(carry), dq.astype(q.dtype)

    nothing = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(attend_block, nothing, (q, gradient, log_sum, average, plan))
    no_gradient: Any = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), plan)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), no_gradient


_attend.defvjp(_forward, _backward)
