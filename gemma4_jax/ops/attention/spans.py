"""Who sees whom, as one interval of keys for every query.

Every mask of Gemma 4 is such an interval: the document so far, cut to a window or not, on to the end of an image whose
soft tokens see each other; the patches of one image; the places of a key-value cache that are filled. So no [T, S]
array is ever made of them but where attention itself has one.
Source: docs/gemma4.md section 2, "Masks".
"""

import dataclasses

import jax
import jax.numpy as jnp

from gemma4_jax.config import TextConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """Query t of row b sees the keys start[b, t] <= s < stop[b, t] of its row.

    Attributes:
      start, stop: [B, T] int32; start < stop, for a softmax over nothing is no number.
      back, ahead: how far before and behind its own place a query sees at most, where that is known before the batch
        is: static, so that an implementation can be shaped by it.
    """

    start: jax.Array
    stop: jax.Array
    back: int | None = dataclasses.field(default=None, metadata={"static": True})
    ahead: int | None = dataclasses.field(default=None, metadata={"static": True})

    def moved(self, distance: jax.Array | int) -> "Spans":
        """The same keys where they stand so much further on."""
        return dataclasses.replace(self, start=self.start + distance, stop=self.stop + distance)

    def mask(self, num_keys: int) -> jax.Array:
        """[B, T, S] bool: whether a query sees a key."""
        keys = jnp.arange(num_keys)
        return (keys >= self.start[..., None]) & (keys < self.stop[..., None])


def document_spans(
    positions: jax.Array,
    index: jax.Array,
    *,
    window: int | None = None,
    image_ids: jax.Array | None = None,
    image_tokens: int | None = None,
) -> Spans:
    """Spans of tokens that see what came before them in their document.

    Args:
      positions: [B, T] int32, place of each token in its document. Padding has 0, and so sees itself.
      index: [B, T] int32, place of each token among the keys, where the rest of its document lies before it.
      window: keys that a query may see up to itself; None is no limit.
      image_ids: [B, T] int32, the image that a soft token belongs to, 0 for none: soft tokens see their image to its
        end. The window bounds the look back only. None is causal throughout.
      image_tokens: soft tokens that an image has at most; None is no limit.
    """
    back = positions if window is None else jnp.minimum(positions, window - 1)
    most_back = None if window is None else window - 1
    if image_ids is None or image_tokens == 0:
        return Spans(index - back, index + 1, most_back, ahead=0)
    ahead = jnp.where(image_ids > 0, _runs(image_ids)[1], 0)
    return Spans(index - back, index + ahead + 1, most_back, None if image_tokens is None else image_tokens - 1)


def text_spans(
    config: TextConfig, positions: jax.Array, index: jax.Array, image_ids: jax.Array, image_tokens: int | None = None
) -> tuple[Spans, Spans]:
    """The spans of sliding and of global layers of a decoder. Arguments as in `document_spans`."""
    blocks = image_ids if config.image_blocks_bidirectional else None
    sliding = document_spans(
        positions, index, window=config.sliding_window, image_ids=blocks, image_tokens=image_tokens
    )
    return sliding, document_spans(positions, index)


def member_spans(ids: jax.Array, *, back: int | None = None, ahead: int | None = None) -> Spans:
    """Spans of the members of groups, each of which sees its own group.

    Args:
      ids: [B, P] int32, the group of each member. The members of a group are neighbours; 0 is padding, which sees
        itself.
      back, ahead: how far a member sees at most; None is no limit.
    """
    index = jnp.arange(ids.shape[1])
    first, last = (jnp.where(ids > 0, distance, 0) for distance in _runs(ids))
    start = index - (first if back is None else jnp.minimum(first, back))
    stop = index + (last if ahead is None else jnp.minimum(last, ahead)) + 1
    return Spans(start, stop, back, ahead)


def _runs(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far each place of [B, T] is from the first and from the last of its run of equal ids."""
    index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    changes = ids[:, 1:] != ids[:, :-1]
    edge = jnp.ones_like(changes, shape=(len(ids), min(ids.shape[1], 1)))
    first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), index, 0), axis=1)
    last = jax.lax.cummin(
        jnp.where(jnp.concatenate([changes, edge], axis=1), index, ids.shape[1]), axis=1, reverse=True
    )
    return index - first, last - index
