"""Positions of a row over the mesh axis `context`: where they lie, and the keys that a shard gets from the others.

A row is cut into two chunks a shard. Causal work grows along a row, so one stretch for each would leave most to the
last shard. In the balanced order shard i of C holds the chunks 2 i and 2 (C - 1 - i) + 1, which together lie as far
into the row for every i: the natural order, in which each shard and its mirror have swapped their second halves. One
`swap_halves` leads there and another one back. So the decoder is the only one to know: it swaps what it is told about
the tokens (whole numbers) and its final hidden states, and for its callers position t is token t as ever. Keys are put
into their natural order where they are gathered, so that what a query sees remains one interval.

On paper, for each device, step and position that it holds: the swap sends D numbers (half of a hidden state, forward
and backward), once. To keep the natural order throughout, and swap queries and outputs in each global layer alone,
would be 5 / 2 N H numbers in each of them (both, queries again where they are recomputed, and both gradients): for E2B
1,536 a step, against 10,240 in each of 7 layers. What the balanced order costs is a halo for each of two chunks.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma4_jax.ops.attention.spans import Spans
from gemma4_jax.sharding import BATCH_AXES


def num_shards(length: int) -> int:
    """Shards over which rows of a length are spread: 1 where they have no two chunks of one size for each."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = mesh.shape.get("context", 1)
    return shards if length % (2 * shards) == 0 else 1


def swap_halves(x: jax.Array) -> jax.Array:
    """[B, T, ...] from the natural to the balanced order, or back: each shard swaps its second half with its mirror."""
    shards = num_shards(x.shape[1])
    if shards == 1:
        return x

    def on_shard(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, axis=1)
        second = jax.lax.ppermute(second, "context", [(i, shards - 1 - i) for i in range(shards)])
        return jnp.concatenate([first, second], axis=1)

    rows = P(BATCH_AXES, "context")
    return jax.shard_map(on_shard, in_specs=rows, out_specs=rows)(x)


class Exchange(NamedTuple):
    """Which keys and values each shard gets from the others.

    Attributes:
      halo: how many before and how many behind each of its chunks; None is the whole row, in its natural order.
    """

    halo: tuple[int, int] | None

    @jax.named_scope("exchange")
    def __call__(self, x: jax.Array) -> jax.Array:
        """What the queries of each device may see.

        The gradient of what a shard got goes back to where it is from, and is added up there.

        Args:
          x: [B, T, K, H] keys or values, in the balanced order.
        Returns:
          [B, S, K, H], spread over `context` by its positions: those that a device has are what it may see. If `tensor`
          does not divide K, it is [B, S, K', H], spread over both by its positions: a device has its `own_heads`.
        """
        mesh = jax.sharding.get_abstract_mesh()
        has_own_heads = x.shape[2] % mesh.shape["tensor"] == 0

        def on_shard(x: jax.Array) -> jax.Array:
            x = x if has_own_heads else own_heads(x)
            return whole_row(x) if self.halo is None else with_halo(x, *self.halo)

        before = P(BATCH_AXES, "context", "tensor" if has_own_heads else None)
        return jax.shard_map(on_shard, in_specs=before, out_specs=self.spec(x.shape[2]), check_vma=False)(x)

    def spec(self, num_kv_heads: int) -> P:
        """How what it returns is spread."""
        if num_kv_heads % jax.sharding.get_abstract_mesh().shape["tensor"] == 0:
            return P(BATCH_AXES, "context", "tensor")
        return P(BATCH_AXES, ("context", "tensor"))

    def spans(self, spans: Spans) -> Spans:
        """Spans of a row in its natural order -> of the keys that each shard has, in the balanced order.

        With a halo they count from the first key that a chunk has.
        """
        if self.halo is not None:
            length = spans.start.shape[1]
            chunk = length // (2 * num_shards(length))
            spans = spans.moved(self.halo[0] - jnp.arange(length) // chunk * chunk)
        return Spans(swap_halves(spans.start), swap_halves(spans.stop), spans.back, spans.ahead)


def exchange_for(spans: Spans) -> Exchange | None:
    """What queries of such spans need of the other shards: None where rows are not spread.

    A halo where it is less than a row, for spans with bounds.
    """
    length = spans.start.shape[1]
    if num_shards(length) == 1:
        return None
    if spans.back is None or spans.ahead is None or 2 * (spans.back + spans.ahead) >= length:
        return Exchange(None)
    return Exchange((spans.back, spans.ahead))


def own_heads(x: jax.Array) -> jax.Array:
    """[B, S, K, H] -> [B, S, K', H], the heads that queries of this shard of `tensor` use, each as often as another.

    Queries of one head may be on several shards, and not all those of a shard need be of the same.
    """
    num_heads, shards = x.shape[2], jax.lax.axis_size("tensor")
    parts = math.lcm(num_heads, shards)  # of all queries, each on one shard and of one head
    own = jax.lax.axis_index("tensor") * (parts // shards) + np.arange(parts // shards)
    heads = [jax.lax.dynamic_slice_in_dim(x, part * num_heads // parts, 1, axis=2) for part in own]
    return jnp.concatenate(heads, axis=2)


def whole_row(x: jax.Array) -> jax.Array:
    """The two chunks of a shard, [B, 2 c, ...] -> those of all shards, [B, T, ...] in the natural order."""
    chunks = jax.lax.all_gather(x.reshape(x.shape[0], 2, -1, *x.shape[2:]), "context", axis=1)
    return jnp.stack([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=2).reshape(x.shape[0], -1, *x.shape[2:])


def with_halo(x: jax.Array, back: int, ahead: int) -> jax.Array:
    """The two chunks of a shard, each with what is around it in its row, from the shards that have that.

    Args:
      x: [B, 2 c, ...]. Before the first and behind the last chunk of a row there are zeros.
    Returns:
      [B, 2 (back + c + ahead), ...].
    """
    own = jnp.split(x, 2, axis=1)
    size, shards = own[0].shape[1], jax.lax.axis_size("context")
    # Of every chunk of a row.
    owners = [j // 2 if j % 2 == 0 else shards - 1 - j // 2 for j in range(2 * shards)]

    def from_chunk(which: int, distance: int) -> jax.Array:
        """What the chunk that is so far to the right of the shard's first or second one holds of its halo."""
        chunks = range(max(0, -distance), min(2 * shards, 2 * shards - distance))
        pairs = [(owners[j + distance], owners[j]) for j in chunks if j % 2 == which]
        near = min(size, (back if distance < 0 else ahead) - size * (abs(distance) - 1))
        chunk = own[(which + distance) % 2]
        return jax.lax.ppermute(chunk[:, size - near :] if distance < 0 else chunk[:, :near], "context", pairs)

    def around(which: int) -> list[jax.Array]:
        before = [from_chunk(which, -distance) for distance in range(-(-back // size), 0, -1)]
        behind = [from_chunk(which, distance) for distance in range(1, -(-ahead // size) + 1)]
        return [*before, own[which], *behind]

    return jnp.concatenate([*around(0), *around(1)], axis=1)
