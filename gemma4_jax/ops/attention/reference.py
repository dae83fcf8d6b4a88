"""The plain computation of attention: every query against every key."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gemma4_jax.ops.attention.spans import Spans

_MASKED = -1e30


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
    """Softmax attention with scale 1 and grouped queries; logits and softmax in float32.

    Cost and memory grow as T * S.

    Args:
      q: [B, T, N, H] queries, already normalised and rotated.
      k, v: [B, S, K, H] keys and values; K divides N.
      spans: the keys that each query sees.
    Returns:
      [B, T, N, H] in q's dtype.
    """
    b, t, n, h = q.shape
    q = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    # Added rather than selected: a sum has nothing to do in the backward pass.
    mask = jnp.where(spans.mask(k.shape[1]), 0, _MASKED)
    weights = jax.nn.softmax(logits + mask[:, None, None], axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    return checkpoint_name(out.reshape(b, t, n, h), "attended")
