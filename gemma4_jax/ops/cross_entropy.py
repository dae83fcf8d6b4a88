"""The head, and log probabilities of tokens under it without ever holding [B, T, V]."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma4_jax.sharding import BATCH_AXES

_SAFE_CAP = 40.0
"""Up to here the exponential of any capped logit, less the cap, is an ordinary float32."""


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

    Peak memory of logits is twice B * chunk * V float32: the backward pass makes each chunk's logits again, and their
    gradient. Of the forward pass it keeps the log-sum-exp of every position. The gradient of the table is accumulated
    in float32. Where `context` shards the positions, a chunk is made of as many from each shard.

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
    log_probs = _log_probs(_in_chunks(hidden, chunk), head.table, _in_chunks(targets, chunk), head.cap)
    return _from_chunks(log_probs, targets.shape, chunk)


def total_log_prob(
    hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array, *, chunk: int, z_weight: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """The sum of weights * `token_log_probs`, where it is what is differentiated: logits are made once.

    The weights are known before the backward pass, so the forward pass of a gradient computes that of each chunk while
    its logits are there, and the backward pass only scales it.

    Args:
      hidden, head, targets, chunk: as in `token_log_probs`.
      weights: [B, T] float32.
      z_weight: of the z-loss, the squared log-sum-exp of a position's logits, which keeps them from drifting.
    Returns:
      (the sum of weights * (log probability - z_weight * z-loss), the sum of weights * z-loss, which has no gradient of
      its own), scalars float32.
    Source: the z-loss is that of Chowdhery et al. 2022 (arXiv:2204.02311), section 5.
    """
    in_chunks = (_in_chunks(x, chunk) for x in (targets, weights))
    total, z_loss = _total(_in_chunks(hidden, chunk), head.table, *in_chunks, head.cap, z_weight)
    return total, jax.lax.stop_gradient(z_loss)


def likeliest_tokens(hidden: jax.Array, head: Head, *, chunk: int) -> jax.Array:
    """[B, T] int32, the likeliest next token of every position. Arguments as in `token_log_probs`."""

    def of_chunk(hidden: jax.Array) -> jax.Array:
        return jnp.argmax(vocabulary_logits(hidden, head), axis=-1).astype(jnp.int32)

    return _from_chunks(jax.lax.map(of_chunk, _in_chunks(hidden, chunk)), hidden.shape[:2], chunk)


def _num_shards(chunk: int) -> int:
    """Shards of the positions that share a chunk evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["context"]
    return shards if chunk % shards == 0 else 1


def _in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B * chunk, ...]: one axis of tokens, over which a matmul needs no transpose."""
    b, t, *rest = x.shape
    if t % chunk:
        raise ValueError(f"chunk={chunk} does not divide the {t} positions of a row")
    shards = _num_shards(chunk)
    x = jnp.moveaxis(x.reshape(b, shards, t // chunk, chunk // shards, *rest), 2, 0)
    x = x.reshape(t // chunk, b * chunk, *rest)
    # The compiler does not always find out that rows and shards of positions, merged, are still spread.
    return jax.lax.with_sharding_constraint(x, P(None, (*BATCH_AXES, "context"))) if shards > 1 else x


def _from_chunks(x: jax.Array, shape: tuple[int, ...], chunk: int) -> jax.Array:
    """The inverse, for one number a token: [chunks, B * chunk] -> [B, T]."""
    shards = _num_shards(chunk)
    return jnp.moveaxis(x.reshape(-1, shape[0], shards, chunk // shards), 0, 2).reshape(shape)


def _in_float32(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def soft_cap(raw: jax.Array, cap: float) -> tuple[jax.Array, jax.Array]:
    """[R, V] logits before the cap -> (logits behind it, its slope there)."""
    if not cap:
        return raw, jnp.ones(())
    bent = jnp.tanh(raw / cap)
    return cap * bent, 1 - bent**2


class _Scores(NamedTuple):
    """What the logits of a chunk of R tokens come to.

    Attributes:
      log_probs: [R], of the targets.
      log_sum: [R], log-sum-exp.
      exponentials: [R, V], of the logits less what keeps them finite.
      total: [R], their sum.
    """

    log_probs: jax.Array
    log_sum: jax.Array
    exponentials: jax.Array
    total: jax.Array


def _score_chunk(logits: jax.Array, targets: jax.Array, cap: float) -> _Scores:
    """Of [R, V] logits and [R] targets."""
    # What is subtracted before the exponential keeps it finite; where the cap does, nobody looks for the largest.
    largest = jnp.float32(cap) if 0 < cap <= _SAFE_CAP else jnp.max(logits, axis=-1)
    exponentials = jnp.exp(logits - jnp.expand_dims(largest, -1))
    total = jnp.sum(exponentials, axis=-1)
    log_sum = largest + jnp.log(total)
    of_targets = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return _Scores(of_targets - log_sum, log_sum, exponentials, total)


def _differentiate_chunk(
    of_targets: jax.Array, of_exponentials: jax.Array, exponentials: jax.Array, slope: jax.Array, targets: jax.Array,
    hidden: jax.Array, table: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Gradients ([R, D], [V, D] float32) of hidden states and table.

    The gradient of a logit behind the cap is of_targets [R] where it is the target's, and of_exponentials [R] times
    its exponential [R, V]; `slope` is that of the cap.
    """
    is_target = targets[:, None] == jnp.arange(table.shape[0])
    of_logits = (is_target * of_targets[:, None] + exponentials * of_exponentials[:, None]) * slope
    of_logits = of_logits.astype(hidden.dtype)
    return of_logits @ table, _in_float32("rv,rd->vd", of_logits, hidden)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probs(hidden: jax.Array, table: jax.Array, targets: jax.Array, cap: float) -> jax.Array:
    """[chunks, R, D] hidden states, [V, D] and [chunks, R] targets -> [chunks, R] float32."""
    return _log_probs_forward(hidden, table, targets, cap)[0]


def _log_probs_forward(hidden: jax.Array, table: jax.Array, targets: jax.Array, cap: float) -> tuple[jax.Array, tuple]:
    def of_chunk(scanned: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = scanned
        return _score_chunk(vocabulary_logits(hidden, Head(table, cap)), targets, cap)[:2]

    log_probs, log_sum = jax.lax.map(of_chunk, (hidden, targets))
    return log_probs, (hidden, table, targets, log_sum)


def _log_probs_backward(cap: float, saved: tuple, gradient: jax.Array) -> tuple:
    hidden, table, targets, log_sum = saved
    weight = table.astype(hidden.dtype)

    def of_chunk(sum_of_table: jax.Array, scanned: tuple) -> tuple[jax.Array, jax.Array]:
        hidden, targets, log_sum, gradient = scanned
        logits, slope = soft_cap(_in_float32("rd,vd->rv", hidden, weight), cap)
        probs = jnp.exp(logits - log_sum[:, None])
        of_hidden, of_table = _differentiate_chunk(gradient, -gradient, probs, slope, targets, hidden, weight)
        return sum_of_table + of_table, of_hidden

    zeros = jnp.zeros(table.shape, jnp.float32)
    of_table, of_hidden = jax.lax.scan(of_chunk, zeros, (hidden, targets, log_sum, gradient))
    return of_hidden, of_table.astype(table.dtype), np.zeros(targets.shape, jax.dtypes.float0)


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _total(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, cap: float, z_weight: float
) -> tuple[jax.Array, jax.Array]:
    """As `_log_probs`, with [chunks, R] weights -> the two sums of `total_log_prob`."""
    log_probs, (*_, log_sum) = _log_probs_forward(hidden, table, targets, cap)
    return _sums(log_probs, log_sum, weights, z_weight)


def _sums(log_probs: jax.Array, log_sum: jax.Array, weights: jax.Array, z_weight: float) -> tuple[jax.Array, jax.Array]:
    z_loss = jnp.sum(weights * log_sum**2)
    return jnp.sum(weights * log_probs) - z_weight * z_loss, z_loss


def _total_forward(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, cap: float, z_weight: float
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    weight = table.astype(hidden.dtype)

    def of_chunk(sum_of_table: jax.Array, scanned: tuple) -> tuple[jax.Array, tuple]:
        hidden, targets, weights = scanned
        logits, slope = soft_cap(_in_float32("rd,vd->rv", hidden, weight), cap)
        log_probs, log_sum, exponentials, total = _score_chunk(logits, targets, cap)
        of_exponentials = -weights * (1 + 2 * z_weight * log_sum) / total
        of_hidden, of_table = _differentiate_chunk(
            weights, of_exponentials, exponentials, slope, targets, hidden, weight
        )
        return sum_of_table + of_table, (log_probs, log_sum, of_hidden)

    zeros = jnp.zeros(table.shape, jnp.float32)
    of_table, (log_probs, log_sum, of_hidden) = jax.lax.scan(of_chunk, zeros, (hidden, targets, weights))
    of_weights = log_probs - z_weight * log_sum**2
    saved = of_hidden, of_table.astype(table.dtype), targets, of_weights
    return _sums(log_probs, log_sum, weights, z_weight), saved


def _total_backward(cap: float, z_weight: float, saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    of_hidden, of_table, targets, of_weights = saved
    gradient, _ = gradients
    # In float32: the scale is one over the weight of all tokens, and bfloat16 would bend every gradient alike.
    of_hidden, of_table = ((gradient * x).astype(x.dtype) for x in (of_hidden, of_table))
    no_gradient = np.zeros(targets.shape, jax.dtypes.float0)
    return of_hidden, of_table, no_gradient, gradient * of_weights


_total.defvjp(_total_forward, _total_backward)
