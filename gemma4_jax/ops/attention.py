"""Attention over packed rows: who may see whom, and the plain computation of it."""

import dataclasses

import jax
import jax.numpy as jnp

from gemma4_jax.ops.gather import invert_rows, move_rows

_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sites:
    """Where tokens stand, as far as attention masks care.

    Attributes:
      index: [B, T] int32, place in the row; differences inside one segment are distances in tokens.
      segment_ids: [B, T] int32, the document a token belongs to; 0 is padding.
      image_ids: [B, T] int32, the image a soft token belongs to; 0 is not a soft token.
    """

    index: jax.Array
    segment_ids: jax.Array
    image_ids: jax.Array


def visible(queries: Sites, keys: Sites, *, window: int | None, image_blocks_bidirectional: bool) -> jax.Array:
    """Which key each query may see.

    Padding counts as one more segment: it sees itself alone, so that no softmax is over nothing.

    Args:
      queries, keys: sites [B, T] and [B, S].
      window: number of keys a query may see, itself included; None is no limit. It bounds the look-back only.
      image_blocks_bidirectional: soft tokens of one image also see each other forward.
    Returns:
      [B, T, S] bool.
    Source: spec section 2, "masks".
    """
    distance = queries.index[:, :, None] - keys.index[:, None, :]
    allowed = distance >= 0
    if image_blocks_bidirectional:
        image = queries.image_ids[:, :, None]
        allowed |= (image == keys.image_ids[:, None, :]) & (image > 0)
    if window is not None:
        allowed &= distance < window
    return allowed & (queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :])


def dot_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with scale 1 and grouped queries; logits and softmax in float32.

    Cost and memory grow as T * S.

    Args:
      q: [B, T, N, H] queries, already normalised and rotated.
      k, v: [B, S, K, H] keys and values; K divides N.
      mask: [B, T, S] or [B, 1, S] bool, True where a query may see a key.
    Returns:
      [B, T, N, H] in q's dtype.
    """
    b, t, n, h = q.shape
    groups = n // k.shape[2]
    q = q.reshape(b, t, k.shape[2], groups, h)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    # Added rather than selected: a sum has nothing to do in the backward pass.
    weights = jax.nn.softmax(logits + jnp.where(mask, 0, _MASKED)[:, None, None], axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    return out.reshape(b, t, n, h)


def segment_attention(q: jax.Array, k: jax.Array, v: jax.Array, members: jax.Array) -> jax.Array:
    """Attention of every token to all tokens of its own segment, computed segment by segment.

    Cost grows as I * W**2 rather than P**2: tokens are moved to one row per segment and back.

    Args:
      q, k, v: [B, P, N, H].
      members: [B, I, W] int32: where the w-th token of segment i lies in the row; -1 is none.
    Returns:
      [B, P, N, H] in q's dtype; zero for tokens that are no member of a segment.
    """
    b, i, w = members.shape
    sources = members.reshape(b, i * w)
    destinations = invert_rows(sources, q.shape[1])
    q, k, v = (move_rows(x, sources, destinations).reshape(b * i, w, *x.shape[2:]) for x in (q, k, v))
    out = dot_attention(q, k, v, mask=(sources >= 0).reshape(b * i, 1, w))
    return move_rows(out.reshape(b, i * w, *out.shape[2:]), destinations, sources)
