"""Attention: one door, `attend`, and the table of what computes it."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gemma4_jax.errors import InputError
from gemma4_jax.ops.attention import banded, blockwise, interval, reference
from gemma4_jax.ops.attention.spans import Spans
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import BATCH_AXES


class Shape(NamedTuple):
    """What an implementation may depend on beside the platform.

    Attributes:
      num_queries, num_keys: of a row, T and S.
      head_dim: H.
      back, ahead: the bounds of the spans; None where there are none.
    """

    num_queries: int
    num_keys: int
    head_dim: int
    back: int | None = None
    ahead: int | None = None


class Implementation(NamedTuple):
    """A way to compute attention.

    Attributes:
      attend: as `reference_attention`, on the rows and heads of one device.
      reason_against: (shape, platform) -> None if it can compute this there, else the reason why not.
    """

    attend: Callable[[jax.Array, jax.Array, jax.Array, Spans], jax.Array]
    reason_against: Callable[[Shape, str], str | None]


IMPLEMENTATIONS: dict[str, Implementation] = {
    "interval": Implementation(interval.interval_attention, interval.reason_against),
    "banded": Implementation(banded.banded_attention, banded.reason_against),
    "blockwise": Implementation(blockwise.blockwise_attention, blockwise.reason_against),
    "reference": Implementation(reference.reference_attention, lambda shape, platform: None),
}
"""Name -> implementation, in the order in which "auto" asks them."""


def with_halo(x: jax.Array, back: int, ahead: int) -> jax.Array:
    """The positions of this shard of `context`, with as many before and behind them from the shards beside it.

    Args:
      x: [B, T, ...], a shard. Beyond the first and the last of them there are zeros.
    Returns:
      [B, back + T + ahead, ...].
    """
    length, num_shards = x.shape[1], jax.lax.axis_size("context")

    def from_shard(distance: int) -> jax.Array:
        """What the shard that is so far to the right holds of it."""
        pairs = [(i + distance, i) for i in range(num_shards) if 0 <= i + distance < num_shards]
        near = min(length, max(0, back if distance < 0 else ahead) - length * (abs(distance) - 1))
        part = x[:, length - near :] if distance < 0 else x[:, :near]
        return jax.lax.ppermute(part, "context", pairs)

    before = [from_shard(-distance) for distance in range(-(-back // length), 0, -1)]
    behind = [from_shard(distance) for distance in range(1, -(-ahead // length) + 1)]
    return jnp.concatenate([*before, x, *behind], axis=1)


@functools.cache
def choose(policy: KernelPolicy, shape: Shape) -> str:
    """The implementation for a shape: the one that the policy names, or the first that can compute it.

    It is logged once for each shape, with the reasons against those before it; one that is named and cannot compute
    what some layer needs, such as a single query behind a cache, is a warning there and not an error.

    Raises:
      InputError: the policy names one that does not exist.
    """
    if policy.attention not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise InputError(f"attention={policy.attention!r} is not possible: it must be auto, or one of {known}.")
    reasons = {name: known.reason_against(shape, policy.platform) for name, known in IMPLEMENTATIONS.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    is_asked_for = policy.attention in able
    chosen = policy.attention if is_asked_for else able[0]
    against = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None)
    level = logging.INFO if is_asked_for or policy.attention == "auto" else logging.WARNING
    logging.log(level, "Attention of %s on %s: %s%s", shape, policy.platform, chosen, against and f" ({against})")
    return chosen


def attend(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, *, implementation: str) -> jax.Array:
    """Softmax attention with scale 1 and grouped queries; logits and softmax in float32.

    Inside a mesh every device computes its own rows, positions of queries and heads. Of the keys of its rows it has
    all; or, where the spans of the keys' own tokens are bounded, those that its queries may see, from the devices
    beside it.

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
    is_spread = q.shape[1] % mesh.shape["context"] == 0
    halo = None
    is_own = is_spread and mesh.shape["context"] > 1 and q.shape[1] == k.shape[1]
    if is_own and spans.back is not None and spans.ahead is not None and spans.back + spans.ahead < k.shape[1]:
        halo = spans.back, spans.ahead

    def on_shard(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
        if not has_own_keys:  # then all of the shard's heads are of one group
            head = jax.lax.axis_index("tensor") * q.shape[2] * num_kv_heads // num_heads
            k, v = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k, v))
        if halo is not None:
            k, v = (with_halo(x, *halo) for x in (k, v))
            spans = spans.moved(halo[0] - jax.lax.axis_index("context") * q.shape[1])
        return on_device(q, k, v, spans)

    queries = P(BATCH_AXES, "context" if is_spread else None)
    keys = P(BATCH_AXES, "context" if halo is not None else None, "tensor" if has_own_keys else None)
    return jax.shard_map(
        on_shard,
        in_specs=(P(*queries, "tensor"), keys, keys, queries),
        out_specs=P(*queries, "tensor"),
        check_vma=False,  # the loops of an implementation begin with constants
    )(q, k, v, spans)
