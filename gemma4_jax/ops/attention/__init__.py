"""Attention: one door, `attend`, and the table of what computes it."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from gemma4_jax.errors import InputError
from gemma4_jax.ops.attention import blockwise, reference
from gemma4_jax.ops.attention.spans import Spans
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import BATCH_AXES


class Shape(NamedTuple):
    """What an implementation may depend on beside the platform: T queries and S keys of a row, and the width H."""

    num_queries: int
    num_keys: int
    head_dim: int


class Implementation(NamedTuple):
    """A way to compute attention.

    Attributes:
      attend: as `reference_attention`, on the rows and heads of one device.
      reason_against: (shape, platform) -> None if it can compute this there, else the reason why not.
    """

    attend: Callable[[jax.Array, jax.Array, jax.Array, Spans], jax.Array]
    reason_against: Callable[[Shape, str], str | None]


IMPLEMENTATIONS: dict[str, Implementation] = {
    "blockwise": Implementation(blockwise.blockwise_attention, blockwise.reason_against),
    "reference": Implementation(reference.reference_attention, lambda shape, platform: None),
}
"""Name -> implementation, in the order in which "auto" asks them."""


@functools.cache
def choose(policy: KernelPolicy, shape: Shape) -> str:
    """The implementation for a shape. It is logged, with the reasons against those before it, once for each shape.

    Raises:
      InputError: the policy names one that does not exist, or that cannot compute this.
    """
    reasons = {name: known.reason_against(shape, policy.platform) for name, known in IMPLEMENTATIONS.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    chosen = able[0] if policy.attention == "auto" else policy.attention
    if chosen not in able:
        reason = reasons.get(chosen, "there is none of this name")
        raise InputError(
            f"attention {chosen!r} is not possible for {shape.num_queries} queries and {shape.num_keys} keys of width "
            f"{shape.head_dim} on {policy.platform}: {reason}; possible are auto, {', '.join(able)}."
        )
    against = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None)
    logging.info("Attention of %s on %s: %s%s", shape, policy.platform, chosen, against and f" ({against})")
    return chosen


def attend(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, *, implementation: str) -> jax.Array:
    """Softmax attention with scale 1 and grouped queries; logits and softmax in float32.

    Inside a mesh every device computes its own rows, positions of queries and heads; it has all keys of its rows.

    Args:
      q: [B, T, N, H] queries, already normalised and rotated.
      k, v: [B, S, K, H] keys and values; K divides N.
      spans: the keys that each query sees.
      implementation: a key of IMPLEMENTATIONS, from `choose`.
    Returns:
      [B, T, N, H] in q's dtype.
    """
    on_device = IMPLEMENTATIONS[implementation].attend
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return on_device(q, k, v, spans)
    num_shards, num_heads, num_kv_heads = mesh.shape["tensor"], q.shape[2], k.shape[2]
    has_own_keys = num_kv_heads % num_shards == 0

    def on_shard(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
        if not has_own_keys:  # then all of the shard's heads are of one group
            head = jax.lax.axis_index("tensor") * q.shape[2] * num_kv_heads // num_heads
            k, v = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k, v))
        return on_device(q, k, v, spans)

    queries = P(BATCH_AXES, "context" if q.shape[1] % mesh.shape["context"] == 0 else None)
    keys = P(BATCH_AXES, None, "tensor" if has_own_keys else None)
    return jax.shard_map(
        on_shard,
        in_specs=(P(*queries, "tensor"), keys, keys, queries),
        out_specs=P(*queries, "tensor"),
        check_vma=False,  # the loops of an implementation begin with constants
    )(q, k, v, spans)
