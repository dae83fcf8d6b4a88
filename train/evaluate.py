"""Held-out loss, and how many of the held-out numbers the model reads exactly.

Greedy decoding gives exactly the truth if and only if, with the truth given, the likeliest token is the true one at
every position of the answer, the one that ends it included: as long as every choice so far was the true one, greedy
decoding has the very prefix that the packed row has, and at the first other choice both have failed. So
`evaluate` needs one forward pass for all documents of a batch. `decode_greedily` goes token by token, and tells what
the model says where it is wrong.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gemma4_jax.batch import Batch
from gemma4_jax.data.pipeline import EvalItem
from gemma4_jax.sharding import batch_sharding
from gemma4_jax.train.step import EvalOutput

BLANK = 128
"""What every pixel becomes where images are blanked: the middle of its range."""

EvalStep = Callable[[Batch], EvalOutput]
"""A forward pass over a global batch, with the parameters already bound."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the model reads in one held-out image.

    Attributes:
      item: the image and its number.
      tokens: what greedy decoding writes before the token that ends an answer; at most as long as the answer's place
        in the row, whose length the answer's last token shares.
      is_right: whether it is the number, and ended where it ends.
    """

    item: EvalItem
    tokens: list[int]
    is_right: bool


def put_batch(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Spreads a batch that every process holds whole over the mesh."""
    return jax.tree.map(lambda x: _put(x, mesh), batch)


def evaluate(
    eval_step: EvalStep,
    batches: Sequence[tuple[Batch, list[EvalItem]]],
    mesh: jax.sharding.Mesh,
    *,
    are_images_blank: bool = False,
) -> dict[str, Any]:
    """Evaluates one model.

    Args:
      eval_step: its forward pass.
      batches: from data.pipeline.eval_batches.
      mesh: the device mesh.
      are_images_blank: replace every image by grey: what is read then, is guessed.
    Returns:
      loss, mean cross entropy over loss weights, in nats; exact_match, share of items whose answer greedy decoding
      gives exactly, None if there is no item.
    """
    outputs = []
    for batch, _ in batches:
        if are_images_blank:
            grey: Any = np.full_like(batch.patches, BLANK)
            batch = dataclasses.replace(batch, patches=grey)
        outputs.append(eval_step(put_batch(batch, mesh)))
        if len(outputs) > 1:  # one waits while one is worked on; more would only hold memory, and a signal up
            jax.block_until_ready(outputs[-2])
    outputs = jax.device_get(outputs)
    right = [
        is_exact(output.greedy, np.asarray(batch.tokens), item)
        for (batch, items), output in zip(batches, outputs, strict=True)
        for item in items
    ]
    return {
        "loss": float(sum(output.loss_sum for output in outputs) / sum(output.weight_sum for output in outputs)),
        "exact_match": float(np.mean(right)) if right else None,
    }


def is_exact(greedy: np.ndarray, tokens: np.ndarray, item: EvalItem) -> bool:
    """Whether greedy decoding gives the answer of one item, by the argument at the top of this module.

    Args:
      greedy: [B, T] likeliest next tokens, with the truth given.
      tokens: [B, T] of the batch.
      item: of the batch.
    """
    answer = slice(item.start, item.stop)
    before = slice(item.start - 1, item.stop - 1)
    return bool(np.array_equal(greedy[item.row, before], tokens[item.row, answer]))


def decode_greedily(
    eval_step: EvalStep, batch: Batch, items: Sequence[EvalItem], mesh: jax.sharding.Mesh
) -> np.ndarray:
    """Decodes the answers of one batch token by token, all its documents side by side.

    The answers are erased, then each pass writes the next token of every document into its place; a token sees none
    after it, so what is still erased does not matter.

    Args:
      eval_step, mesh: as in `evaluate`.
      batch: on the host.
      items: those of the batch.
    Returns:
      [B, T] int32, the batch's tokens with what the model writes in place of the answers.
    """
    tokens = np.array(batch.tokens)
    for item in items:
        tokens[item.row, item.start : item.stop] = 0
    on_device = put_batch(batch, mesh)
    for i in range(max(item.stop - item.start for item in items)):
        given = dataclasses.replace(on_device, tokens=_put(tokens.copy(), mesh))
        greedy = jax.device_get(eval_step(given).greedy)
        for item in items:
            if item.start + i < item.stop:
                tokens[item.row, item.start + i] = greedy[item.row, item.start + i - 1]
    return tokens


def read_greedily(
    eval_step: EvalStep, batch: Batch, items: Sequence[EvalItem], mesh: jax.sharding.Mesh
) -> list[Reading]:
    """What the model reads in the images of one batch, in order of items. Arguments as in `decode_greedily`."""
    decoded, given = decode_greedily(eval_step, batch, items, mesh), np.asarray(batch.tokens)
    readings = []
    for item in items:
        written, truth = (tokens[item.row, item.start : item.stop].tolist() for tokens in (decoded, given))
        end = written.index(truth[-1]) if truth[-1] in written else len(written)
        readings.append(Reading(item, written[:end], written == truth))
    return readings


def _put(x: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])
