"""The head, and log probabilities of tokens under it without ever holding [B, T, V]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Head(NamedTuple):
    """From hidden states to logits.

    Attributes:
      table: [V, D], the tied token embedding.
      cap: c of c * tanh(logits / c), on the logits; 0 for none.
    """

    table: jax.Array
    cap: float


@jax.named_scope("head")
def vocabulary_logits(hidden: jax.Array, head: Head) -> jax.Array:
    """[..., D] hidden states -> [..., V] float32 logits, soft-capped."""
    table = head.table.astype(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    return head.cap * jnp.tanh(logits / head.cap) if head.cap else logits


def token_log_probs(hidden: jax.Array, head: Head, targets: jax.Array, *, chunk: int) -> jax.Array:
    """Log probabilities of given next tokens, `chunk` positions of every row at a time.

    Peak memory of logits is B * chunk * V: each chunk's logits are made again in the backward pass.

    Args:
      hidden: [B, T, D] final hidden states.
      head: of the model.
      targets: [B, T] int32.
      chunk: positions per chunk; divides T.
    Returns:
      [B, T] float32, at most 0.
    Raises:
      ValueError: if chunk does not divide T.
    """
    length = hidden.shape[1]
    if length % chunk:
        raise ValueError(f"chunk={chunk} does not divide the {length} positions of a row")

    @jax.checkpoint
    def of_chunk(start: jax.Array) -> jax.Array:
        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)

        logits = vocabulary_logits(cut(hidden), head)
        target_logits = jnp.take_along_axis(logits, cut(targets)[..., None], axis=-1)[..., 0]
        return target_logits - jax.nn.logsumexp(logits, axis=-1)

    chunks = jax.lax.map(of_chunk, jnp.arange(0, length, chunk))
    return jnp.moveaxis(chunks, 0, 1).reshape(targets.shape)


def likeliest_tokens(hidden: jax.Array, head: Head, *, chunk: int) -> jax.Array:
    """[B, T] int32, the likeliest next token of every position. Arguments as in `token_log_probs`."""

    def of_chunk(start: jax.Array) -> jax.Array:
        logits = vocabulary_logits(jax.lax.dynamic_slice_in_dim(hidden, start, chunk, axis=1), head)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    chosen = jax.lax.map(of_chunk, jnp.arange(0, hidden.shape[1], chunk))
    return jnp.moveaxis(chosen, 0, 1).reshape(hidden.shape[:2])
