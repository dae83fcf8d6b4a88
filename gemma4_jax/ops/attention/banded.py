"""Attention of a band: each block of queries against the keys around it, which are as many for every block.

For windows. The keys that a block may see are one slice whose size is known before the batch is, so there is no loop
over blocks of keys and no running softmax. Cost grows as T times the window, and memory as T.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gemma4_jax.ops.attention.spans import Spans

LEAST_BLOCK, LARGEST_BLOCK = 64, 256
"""Queries to a block: few for the sake of the keys that only some of them see, many for the speed of a matmul."""

_MASKED = -1e30


class _Band(NamedTuple):
    """How blocks of queries and of keys lie to each other; static.

    Attributes:
      block: queries to a block.
      first: place of the first key of the first block; below 0 for keys that are not there.
      num_keys: to a block.
    """

    block: int
    first: int
    num_keys: int


def block_size(reach: int) -> int:
    """Queries to a block, where one of them may see so many keys: half as many, as a power of two."""
    return min(max(1 << (reach // 2).bit_length() - 1, LEAST_BLOCK), LARGEST_BLOCK) if reach > 1 else LEAST_BLOCK


def banded_attention(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
    """As `reference_attention`, for spans with bounds; the backward pass computes the scores again.

    Query t stands at the key t, where there are as many keys as queries; else the keys are those of the queries with
    `back` more before them and `ahead` more behind.
    """
    assert spans.back is not None
    assert spans.ahead is not None
    b, t, n, h = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    assert num_keys - t in (0, spans.back + spans.ahead)
    first = 0 if num_keys > t else -spans.back
    block = block_size(spans.back + spans.ahead + 1)
    band = _Band(block, first, block + spans.back + spans.ahead)
    num_blocks = -(-t // block)
    fill = num_blocks * block - t

    def blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, fill), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(b, num_blocks, block, *x.shape[2:]), 1, 0)

    queries = blocks(q.reshape(b, t, num_kv_heads, n // num_kv_heads, h))
    queries = queries.transpose(0, 1, 3, 4, 2, 5).reshape(num_blocks, b, num_kv_heads, -1, h)
    before, behind = max(0, -first), max(0, first + (num_blocks - 1) * block + band.num_keys - num_keys)

    def around(x: jax.Array) -> jax.Array:
        """[B, S, K, H] -> [B, K, S', H], so that every block has its keys."""
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (before, behind), (0, 0)))

    out = _attend(queries, around(k), around(v), blocks(spans.start), blocks(spans.stop), band)
    out = out.reshape(num_blocks, b, num_kv_heads, -1, block, h).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(b, num_blocks * block, n, h)[:, :t]


def reason_against(shape: Any, platform: str) -> str | None:
    """Why it should not compute attention of a shape, or None."""
    if shape.back is None or shape.ahead is None:
        return "nothing bounds how far a query sees"
    if shape.num_queries != shape.num_keys:
        return "the queries are not the keys' own tokens"
    if shape.num_keys < 2 * (shape.back + shape.ahead + 1):
        return f"of {shape.num_keys} keys a query may see {shape.back + shape.ahead + 1}, more than half"
    return None


def _cut(x: jax.Array, i: jax.Array, band: _Band) -> jax.Array:
    """[B, K, S', H] -> [B, K, L, H], the keys of block i."""
    return jax.lax.dynamic_slice_in_dim(x, i * band.block + max(0, band.first), band.num_keys, axis=2)


def _scores(q: jax.Array, k: jax.Array, i: jax.Array, start: jax.Array, stop: jax.Array, band: _Band) -> jax.Array:
    """[B, K, R, H] queries of block i against its keys -> [B, K, R, L] float32."""
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32)
    keys = band.first + i * band.block + jnp.arange(band.num_keys, dtype=jnp.int32)
    is_seen = (keys >= start[..., None]) & (keys < stop[..., None])
    bias = jnp.where(is_seen, 0.0, _MASKED)[:, None, None]
    grouped = scores.reshape(*scores.shape[:2], -1, band.block, band.num_keys)
    return (grouped + bias).reshape(scores.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, stop: jax.Array, band: _Band
) -> jax.Array:  # fmt: skip
    return _forward(q, k, v, start, stop, band)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, stop: jax.Array, band: _Band
) -> tuple[jax.Array, tuple]:
    """[blocks, B, K, R, H] attended, and what the backward pass needs."""

    def attend_block(scanned: tuple) -> tuple[jax.Array, jax.Array]:
        i, q, start, stop = scanned
        scores = _scores(q, _cut(k, i, band), i, start, stop, band)
        largest = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - largest[..., None])
        total = jnp.sum(weights, axis=-1)
        out = jnp.einsum(
            "bkrs,bksh->bkrh", weights.astype(v.dtype), _cut(v, i, band), preferred_element_type=jnp.float32
        )
        return (out / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    out, log_sum = jax.lax.map(attend_block, (jnp.arange(len(q)), q, start, stop))
    out, log_sum = (checkpoint_name(x, "attended") for x in (out, log_sum))
    return out, (q, k, v, start, stop, out, log_sum)


def _backward(band: _Band, saved: tuple, gradient: jax.Array) -> tuple:
    q, k, v, start, stop, out, log_sum = saved
    # The gradient of a score is its weight times (what it would gain - what its row gains on average).
    average = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend_block(carry: tuple, scanned: tuple) -> tuple[tuple, jax.Array]:
        i, q, gradient, log_sum, average, start, stop = scanned
        keys, values = _cut(k, i, band), _cut(v, i, band)
        weights = jnp.exp(_scores(q, keys, i, start, stop, band) - log_sum[..., None])
        dscores = (weights * (einsum("bkrh,bksh->bkrs", gradient, values) - average[..., None])).astype(q.dtype)
        added = einsum("bkrs,bkrh->bksh", dscores, q), einsum("bkrs,bkrh->bksh", weights.astype(q.dtype), gradient)
        place = i * band.block + max(0, band.first)
        carry = tuple(
            jax.lax.dynamic_update_slice_in_dim(total, _cut(total, i, band) + part, place, axis=2)
            for total, part in zip(carry, added, strict=True)
        )
        return carry, einsum("bkrs,bksh->bkrh", dscores, keys).astype(q.dtype)

    nothing = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    scanned = jnp.arange(len(q)), q, gradient, log_sum, average, start, stop
    (dk, dv), dq = jax.lax.scan(attend_block, nothing, scanned)
    none = np.zeros(start.shape, jax.dtypes.float0)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), none, none


_attend.defvjp(_forward, _backward)
