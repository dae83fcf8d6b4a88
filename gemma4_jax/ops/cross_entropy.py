"""Cross entropy against a tied vocabulary without ever holding [B, T, V]."""

import jax
import jax.numpy as jnp


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap); unchanged where cap is 0."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def vocabulary_logits(hidden: jax.Array, table: jax.Array, *, cap: float) -> jax.Array:
    """[..., D] hidden states and [V, D] table -> [..., V] float32 logits, soft-capped."""
    logits = jnp.einsum("...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return softcap(logits, cap)


def chunked_cross_entropy(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, *, cap: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted next-token cross entropy, `chunk` positions of every row at a time.

    Peak memory of logits is B * chunk * V: each chunk's logits are made again in the backward pass.

    Args:
      hidden: [B, T, D] final hidden states.
      table: [V, D] tied token embedding.
      targets: [B, T] int32.
      weights: [B, T] float32.
      cap: final logit soft-cap, 0 for none.
      chunk: positions per chunk; divides T.
    Returns:
      (sum of weight * loss, sum of weights), float32 scalars.
    Raises:
      ValueError: if chunk does not divide T.
    """
    length = hidden.shape[1]
    if length % chunk:
        raise ValueError(f"chunk={chunk} does not divide the {length} positions of a row")

    @jax.checkpoint
    def chunk_loss(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)

        logits = vocabulary_logits(cut(hidden), table, cap=cap)
        target_logits = jnp.take_along_axis(logits, cut(targets)[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
        return total + jnp.sum(losses * cut(weights)), None

    total, _ = jax.lax.scan(chunk_loss, jnp.zeros((), jnp.float32), jnp.arange(0, length, chunk))
    return total, jnp.sum(weights)
