"""Attention: one door, `attend`, and the table of what computes it."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from gemma4_jax.errors import InputError
from gemma4_jax.ops.attention import banded, blockwise, interval, mosaic_gpu, reference
from gemma4_jax.ops.attention.context import Exchange, own_heads
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
      is_automatic: whether "auto" may take it, or a policy must name it.
    """

    attend: Callable[[jax.Array, jax.Array, jax.Array, Spans], jax.Array]
    reason_against: Callable[[Shape, str], str | None]
    is_automatic: bool = True


IMPLEMENTATIONS: dict[str, Implementation] = {
    "interval": Implementation(interval.interval_attention, interval.reason_against),
    "banded": Implementation(banded.banded_attention, banded.reason_against),
    "blockwise": Implementation(blockwise.blockwise_attention, blockwise.reason_against),
    "mosaic_gpu": Implementation(mosaic_gpu.mosaic_gpu_attention, mosaic_gpu.reason_against, is_automatic=False),
    "reference": Implementation(reference.reference_attention, lambda shape, platform: None),
}
"""Name -> implementation, in the order in which "auto" asks them."""


def check_policy(policy: KernelPolicy, shapes: Sequence[Shape]) -> None:
    """Refuses a name that is of no use to a model.

    Args:
      policy: of the model.
      shapes: of its layers.
    Raises:
      InputError: the policy names an implementation that does not exist, or that can compute none of the shapes.
    """
    reasons = {
        name: [known.reason_against(shape, policy.platform) for shape in shapes]
        for name, known in IMPLEMENTATIONS.items()
    }
    able = ["auto", *(name for name, against in reasons.items() if None in against)]
    if policy.attention in able:
        return
    _check_name(policy)
    against = "; ".join(dict.fromkeys(filter(None, reasons[policy.attention])))
    raise InputError(
        f"attention={policy.attention!r} is not possible for any layer of this model on {policy.platform} ({against}): "
        f"it must be {', '.join(able[:-1])} or {able[-1]}."
    )


def _check_name(policy: KernelPolicy) -> None:
    if policy.attention not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise InputError(f"attention={policy.attention!r} is not possible: it must be auto, or one of {known}.")


@functools.cache
def choose(policy: KernelPolicy, shape: Shape) -> str:
    """The implementation for a shape: the one that the policy names, or the first of all that can compute it.

    One name serves all kinds of layers of a model, and training and decoding. So where the one that is named cannot
    compute a shape, that is a warning, and another is taken; `check_policy` refuses one that is of no use at all. The
    choice is logged once for each shape, with the reasons against others.

    Raises:
      InputError: the policy names one that does not exist.
    """
    _check_name(policy)
    reasons = {name: known.reason_against(shape, policy.platform) for name, known in IMPLEMENTATIONS.items()}
    for name, reason in reasons.items():
        if reason is None and policy.attention != name and not IMPLEMENTATIONS[name].is_automatic:
            reasons[name] = "it is taken only where it is named"
    able = [name for name, reason in reasons.items() if reason is None]
    is_asked_for = policy.attention in able
    chosen = policy.attention if is_asked_for else able[0]
    against = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None)
    level = logging.INFO if is_asked_for or policy.attention == "auto" else logging.WARNING
    logging.log(level, "Attention of %s on %s: %s%s", shape, policy.platform, chosen, against and f" ({against})")
    return chosen


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, *, implementation: str, exchange: Exchange | None = None
) -> jax.Array:
    """Softmax attention with scale 1 and grouped queries; logits and softmax in float32.

    Inside a mesh every device computes its own rows, positions of queries and heads.

    Args:
      q: [B, T, N, H] queries, already normalised and rotated.
      k, v: [B, S, K, H] keys and values; K divides N. With an exchange, what it returned of them.
      spans: the keys that each query sees; with an exchange, its own.
      implementation: a key of IMPLEMENTATIONS, from `choose`.
      exchange: where positions are spread over `context`, that of the keys. Without it a device has all keys of its
        rows.
    Returns:
      [B, T, N, H] in q's dtype.
    """
    on_device = IMPLEMENTATIONS[implementation].attend
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return on_device(q, k, v, spans)
    has_own_heads = k.shape[2] % mesh.shape["tensor"] == 0

    def on_shard(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
        if exchange is None and not has_own_heads:
            k, v = own_heads(k), own_heads(v)
        if exchange is None or exchange.halo is None:
            return on_device(q, k, v, spans)
        chunks = jax.tree.map(lambda x: x.reshape(2 * x.shape[0], -1, *x.shape[2:]), (q, k, v, spans))
        return on_device(*chunks).reshape(q.shape)

    if exchange is not None:
        queries, keys = P(BATCH_AXES, "context"), exchange.spec(k.shape[2])
    else:
        # Where spans have bounds, a query has its place among the keys: then whole rows.
        is_spread = spans.back is None and q.shape[1] % mesh.shape["context"] == 0
        queries = P(BATCH_AXES, "context" if is_spread else None)
        keys = P(BATCH_AXES, None, "tensor" if has_own_heads else None)
    return jax.shard_map(
        on_shard,
        in_specs=(P(*queries, "tensor"), keys, keys, queries),
        out_specs=P(*queries, "tensor"),
        check_vma=False,  # the loops of an implementation begin with constants
    )(q, k, v, spans)
