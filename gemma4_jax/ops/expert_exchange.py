"""Tokens to the shards of the `expert` axis that hold their experts, and the results back. Inside `jax.shard_map`.

Dropless: a shard has room for every token of its group. A token goes to a shard once, however many of its experts are
there, and comes back as one sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma4_jax.ops.grouped import sort_by_group

NOBODY = -(2**30)
"""A choice that is of no expert, on any shard."""

Apply = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(tokens [R, D], choices [R, C], weights [R, C]) -> [R, D], what a shard's own experts add to each token."""


def gather(x: jax.Array, choices: jax.Array, weights: jax.Array, *, num_experts: int, apply: Apply) -> jax.Array:
    """Every token to every shard, by an all-gather; back by a reduce-scatter.

    Args:
      x: [M, D] tokens of this shard.
      choices: [M, C] int32 among the experts of all shards, or NOBODY.
      weights: [M, C] float32.
      num_experts: on each shard.
      apply: what the experts of this shard do.
    Returns:
      [M, D] in x's dtype.
    """
    x, choices, weights = (jax.lax.all_gather(value, "expert", tiled=True) for value in (x, choices, weights))
    out = apply(x, choices - jax.lax.axis_index("expert") * num_experts, weights)
    return jax.lax.psum_scatter(out, "expert", tiled=True)


def ragged(x: jax.Array, choices: jax.Array, weights: jax.Array, *, num_experts: int, apply: Apply) -> jax.Array:
    """Each token to the shards of its experts alone, there and back by `ragged_all_to_all`. As `gather`."""
    num_tokens, num_choices = choices.shape
    num_shards, here = jax.lax.axis_size("expert"), jax.lax.axis_index("expert")
    shard = choices // num_experts
    is_repeated = jnp.any(jnp.tril(shard[:, :, None] == shard[:, None, :], -1), axis=-1)
    order, sizes = sort_by_group(jnp.where(is_repeated, NOBODY, shard).reshape(-1), num_shards)
    token = order // num_choices
    rows = jax.lax.all_gather(sizes, "expert")  # [from, to]
    first_sent = jnp.cumsum(rows, axis=1) - rows
    first_received = jnp.cumsum(rows, axis=0) - rows

    def send(value: jax.Array, nothing: int) -> jax.Array:
        room = jnp.full((num_shards * num_tokens, value.shape[1]), nothing, value.dtype)
        return jax.lax.ragged_all_to_all(
            value[token], room, first_sent[here], rows[here], first_received[here], rows[:, here], axis_name="expert"
        )

    def send_back(value: jax.Array) -> jax.Array:
        room = jnp.zeros((len(order), value.shape[1]), value.dtype)
        return jax.lax.ragged_all_to_all(
            value, room, first_received[:, here], rows[:, here], first_sent[:, here], rows[here], axis_name="expert"
        )

    out = apply(send(x, 0), send(choices, NOBODY) - here * num_experts, send(weights, 0))
    # A token's sums of several shards are added in float32, and so are their gradients.
    return jnp.zeros(x.shape, jnp.float32).at[token].add(send_back(out)).astype(x.dtype)


EXCHANGES = {"gather": gather, "ragged": ragged}
"""Name -> exchange."""
