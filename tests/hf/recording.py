"""What every layer of our stacks puts out, though they are scanned."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.audio.tower import ConformerLayer
from gemma4_jax.batch import Batch
from gemma4_jax.model import Gemma4
from gemma4_jax.text.block import DecoderLayer
from gemma4_jax.vision.tower import VisionLayer

STACKS = {"decoder": DecoderLayer, "vision": VisionLayer, "audio": ConformerLayer}


def logits_and_layers(model: Gemma4, rows: Batch) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    """([B, T, V] logits, for each stack the hidden states after each of its layers)."""
    graphdef, state = nnx.split(model)
    compute = jax.jit(lambda state, rows: nnx.merge(graphdef, state)(rows))
    with contextlib.ExitStack() as stack:
        found = {name: stack.enter_context(_recorded(layer)) for name, layer in STACKS.items()}
        logits = np.asarray(compute(state, jax.tree.map(jnp.asarray, rows)))
        jax.effects_barrier()
    return logits, found


@contextlib.contextmanager
def _recorded(layer: type[nnx.Module]) -> Iterator[list[np.ndarray]]:
    """Collects the first result of every call of a kind of layer, in order."""
    found: list[np.ndarray] = []
    original = layer.__call__

    def call(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        jax.debug.callback(lambda x: found.append(np.asarray(x, np.float32)), first, ordered=True)
        return result

    with mock.patch.object(layer, "__call__", call):
        yield found


def in_reference_order(stack: str, ours: np.ndarray, batch: Batch, row: int, document: int = 1) -> np.ndarray:
    """[..., D] of one document as the reference lays it out: tokens, patches in raster order, sounds.

    Args:
      stack: key of STACKS.
      ours: hidden states after one of its layers.
      batch: what they were computed from.
      row, document: which row of it, and which document of the row, from 1.
    """
    batch = jax.tree.map(np.asarray, batch)
    is_here = batch.segment_ids[row] == document
    if stack == "decoder":
        return ours[row, is_here]
    if stack == "audio":
        slots = batch.audio_slots[row, is_here]
        return ours[row, slots[slots >= 0]]
    image_ids, positions = batch.patch_image_ids[row], batch.patch_positions[row]
    order = np.lexsort((positions[:, 0], positions[:, 1], image_ids))
    images = np.setdiff1d(batch.image_ids[row, is_here], [0])
    return ours[row, order[np.isin(image_ids[order], images)]]
