"""The loss of training over a mesh: the vocabulary is spread over the devices, and the tokens come to it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma4_jax.ops import cross_entropy
from gemma4_jax.ops.cross_entropy import Head, soft_cap
from gemma4_jax.sharding import BATCH_AXES

_TOKENS, _TABLE = P(BATCH_AXES, "context"), P("tensor", "fsdp")
_VOCAB_AXES = "tensor", "fsdp"


def total_log_prob(
    hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array, *, chunk: int, z_weight: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """As `cross_entropy.total_log_prob`, which is what computes it where there is no mesh.

    Left to the partitioner, every chunk of positions gathers the table and adds up its gradient over all devices. Here
    the devices of an `fsdp` (and `tensor`) group have each a part of the vocabulary, and what is gathered is their
    hidden states: a table is far larger than those of a chunk. Each makes its part of the logits of them all, and adds
    up the gradient of its part of the table, in float32; what it sends of that gradient, it sends once.

    Args:
      hidden: [B, T, D] final hidden states.
      head: of the model.
      targets: [B, T] int32.
      weights: [B, T] float32.
      chunk: positions of a row whose logits exist at one time.
      z_weight: of the z-loss.
    Returns:
      (the sum with the z-loss, the sum of the z-loss alone), scalars float32.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not _divides(mesh.shape, hidden, head.table, chunk):
        return cross_entropy.total_log_prob(hidden, head, targets, weights, chunk=chunk, z_weight=z_weight)
    length = chunk // mesh.shape["context"]
    total, z_loss = _total(hidden, head.table, targets, weights, head.cap, length, z_weight)
    return total, jax.lax.stop_gradient(z_loss)


def _divides(mesh: dict[str, int], hidden: jax.Array, table: jax.Array, chunk: int) -> bool:
    """Whether every device has as many rows, positions of a chunk, tokens of the vocabulary and channels as any."""
    is_even = (
        hidden.shape[0] % math.prod(mesh[axis] for axis in BATCH_AXES) == 0,
        hidden.shape[1] % chunk == 0 and chunk % mesh["context"] == 0,
        table.shape[0] % (mesh["tensor"] * mesh["fsdp"]) == 0,
        table.shape[1] % mesh["fsdp"] == 0,
    )
    return all(is_even)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _total(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    cap: float,
    chunk: int,
    z_weight: float,
) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, table, targets, weights, cap, chunk, z_weight)[0]


def _forward(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    cap: float,
    chunk: int,
    z_weight: float,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    """The weights are known, so the gradients of a chunk are made while its logits are there, as `cross_entropy` does.

    Args:
      chunk: positions of a row that a device has in a chunk.
    """

    def in_chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)

    def on_shard(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        # From some channels of all tokens of `tensor`'s part of the vocabulary to all channels of some of them.
        part = jax.lax.all_to_all(table.astype(hidden.dtype), "fsdp", split_axis=0, concat_axis=1, tiled=True)
        first = jax.lax.axis_index(_VOCAB_AXES) * len(part)

        def of_chunk(of_part: jax.Array, scanned: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple]:
            rows = scanned[0].shape[0] * chunk
            here = (x.reshape(rows, *x.shape[2:]) for x in scanned)
            hidden, targets, weights = (jax.lax.all_gather(x, "fsdp", axis=0, tiled=True) for x in here)
            log_probs, log_sum, of_logits = _of_logits(hidden, part, targets - first, weights, cap, z_weight)
            of_hidden = jax.lax.dot(of_logits, part, preferred_element_type=jnp.float32)
            of_hidden = jax.lax.psum(jax.lax.psum_scatter(of_hidden, "fsdp", tiled=True), "tensor")
            of_part += jnp.einsum("rv,rd->vd", of_logits, hidden, preferred_element_type=jnp.float32)
            own = (
                jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("fsdp") * rows, rows).reshape(-1, chunk)
                for x in (log_probs, log_sum)
            )
            return of_part, (*own, of_hidden.astype(hidden.dtype).reshape(scanned[0].shape))

        zeros = jnp.zeros(part.shape, jnp.float32)
        of_part, outputs = jax.lax.scan(of_chunk, zeros, tuple(map(in_chunks, (hidden, targets, weights))))
        log_probs, log_sum, of_hidden = (jnp.moveaxis(x, 0, 1).reshape(*targets.shape, *x.shape[3:]) for x in outputs)
        of_table = jax.lax.psum(of_part, ("data", "expert", "context"))
        of_table = jax.lax.all_to_all(of_table, "fsdp", split_axis=1, concat_axis=0, tiled=True)
        of_weights = log_probs - z_weight * log_sum**2
        sums = (jax.lax.psum(jnp.sum(weights * x), (*BATCH_AXES, "context")) for x in (of_weights, log_sum**2))
        return *sums, of_hidden, of_table.astype(table.dtype), of_weights

    total, z_loss, of_hidden, of_table, of_weights = jax.shard_map(
        on_shard,
        in_specs=(_TOKENS, _TABLE, _TOKENS, _TOKENS),
        out_specs=(P(), P(), _TOKENS, _TABLE, _TOKENS),
        check_vma=False,  # the loop begins with zeros
    )(hidden, table, targets, weights)
    return (total, z_loss), (of_hidden, of_table, of_weights)


def _of_logits(
    hidden: jax.Array, part: jax.Array, places: jax.Array, weights: jax.Array, cap: float, z_weight: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log probabilities [R], log-sum-exps [R], and the gradient of what they come to by the raw logits [R, V'] of a
    part [V', D] of the vocabulary.

    Args:
      places: [R] of the targets in the part, outside of [0, V') for those of other parts.
    """
    raw = jnp.einsum("rd,vd->rv", hidden, part, preferred_element_type=jnp.float32)
    logits, slope = soft_cap(raw, cap)
    largest = jax.lax.pmax(jnp.max(logits, axis=-1), _VOCAB_AXES)
    log_sum = largest + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1), _VOCAB_AXES))
    is_target = places[:, None] == jnp.arange(len(part))
    of_target = jax.lax.psum(jnp.sum(jnp.where(is_target, logits, 0), axis=-1), _VOCAB_AXES)
    of_log_sum = (1 + 2 * z_weight * log_sum)[:, None]
    of_logits = (is_target - jnp.exp(logits - log_sum[:, None]) * of_log_sum) * weights[:, None] * slope
    return of_target - log_sum, log_sum, of_logits.astype(hidden.dtype)


def _backward(cap: float, chunk: int, z_weight: float, saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    of_hidden, of_table, of_weights = saved
    gradient, _ = gradients  # the z-loss alone has none
    # In float32: the scale is one over the weight of all tokens, and bfloat16 would bend every gradient alike.
    of_hidden, of_table = ((gradient * x).astype(x.dtype) for x in (of_hidden, of_table))
    no_gradient = np.zeros(of_weights.shape, jax.dtypes.float0)
    return of_hidden, of_table, no_gradient, gradient * of_weights


_total.defvjp(_forward, _backward)
