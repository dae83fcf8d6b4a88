"""Packed rows to a `Batch`, and how full it is."""

from collections.abc import Sequence

import numpy as np

from gemma4_jax.audio.features import FRAMES_PER_SOFT_TOKEN, num_frame_places, num_soft_tokens
from gemma4_jax.batch import Batch, padding
from gemma4_jax.config import SpecialTokens
from gemma4_jax.data.example import Example
from gemma4_jax.data.images import ImagePatches
from gemma4_jax.data.pack import RowShape

WEIGHT_POWERS = {"token": 0.0, "square_root": 0.5, "document": 1.0}
"""How `data.loss_weighting` weighs a token: by the number of learned tokens of its document to minus this power."""


def assemble(
    rows: Sequence[Sequence[Example]], shape: RowShape, tokens: SpecialTokens, *, weighting: str = "token"
) -> Batch:
    """Writes packed rows into the arrays of a batch.

    Args:
      rows: B lists of examples, each of which fits in a row; an empty one makes a row of padding.
      shape: of a row.
      tokens: ids of the placeholders.
      weighting: a key of `WEIGHT_POWERS`.
    Returns:
      Batch of numpy arrays.
    """
    arrays = padding({"batch": len(rows), **shape.sizes()})
    for b, examples in enumerate(rows):
        row = {name: array[b] for name, array in arrays.items()}
        _write_text(row, examples, WEIGHT_POWERS[weighting])
        _write_images(row, [image for example in examples for image in example.images], tokens.image)
        _write_sounds(row, [sound for example in examples for sound in example.sounds], tokens.audio)
    return Batch(**arrays)  # type: ignore[arg-type]  # numpy arrays on the host


def _write_text(row: dict[str, np.ndarray], examples: Sequence[Example], power: float) -> None:
    start = 0
    for segment, example in enumerate(examples, start=1):
        n = len(example.tokens)
        row["tokens"][start : start + n] = example.tokens
        row["targets"][start : start + n - 1] = example.tokens[1:]
        learned = example.carries_loss[1:]
        row["loss_weights"][start : start + n - 1] = learned * max(1, learned.sum()) ** -power
        row["positions"][start : start + n] = np.arange(n)
        row["segment_ids"][start : start + n] = segment
        start += n


def _write_images(row: dict[str, np.ndarray], images: Sequence[ImagePatches], image_token: int) -> None:
    is_soft_token = row["tokens"] == image_token
    row["image_slots"][is_soft_token] = np.arange(is_soft_token.sum())
    soft_tokens = [image.num_soft_tokens for image in images]
    row["image_ids"][is_soft_token] = np.repeat(np.arange(1, len(images) + 1), soft_tokens)
    start = 0
    for i, image in enumerate(images):
        stop = start + len(image.patches)
        row["patches"][start:stop] = image.patches
        row["patch_positions"][start:stop] = image.positions
        row["patch_image_ids"][start:stop] = i + 1
        start = stop


def _write_sounds(row: dict[str, np.ndarray], sounds: Sequence[np.ndarray], audio_token: int) -> None:
    start, slots = 0, []
    for number, sound in enumerate(sounds, start=1):
        row["audio_features"][start : start + len(sound)] = sound
        row["frame_sound_ids"][start : start + len(sound)] = number
        slots.append(start // FRAMES_PER_SOFT_TOKEN + np.arange(num_soft_tokens(len(sound))))
        start += num_frame_places(len(sound))
    row["audio_slots"][row["tokens"] == audio_token] = np.concatenate(slots) if slots else ()


def packing_stats(batch: Batch) -> dict[str, float]:
    """How full a batch on the host is.

    Returns:
      token_padding and patch_padding, shares in 0..1 (patch_padding 0 without patches); documents and images, counts.
    """
    segments, patches = np.asarray(batch.segment_ids), np.asarray(batch.patch_image_ids)
    return {
        "token_padding": float(np.mean(segments == 0)),
        "patch_padding": float(np.mean(patches == 0)) if patches.size else 0.0,
        "documents": int(segments.max(axis=1).sum()),
        "images": int(patches.max(axis=1, initial=0).sum()),
    }
