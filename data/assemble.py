"""Packed rows to a `Batch`, and how full it is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma4_jax.audio.features import num_soft_tokens
from gemma4_jax.batch import Batch
from gemma4_jax.data.images import ImagePatches
from gemma4_jax.data.pack import RowShape
from gemma4_jax.data.tokenize import Example


def assemble(rows: Sequence[Sequence[Example]], shape: RowShape, image_token: int) -> Batch:
    """Writes packed rows into the arrays of a batch.

    Args:
      rows: B lists of examples, each of which fits in a row; an empty one makes a row of padding.
      shape: of a row.
      image_token: id of the placeholder.
    Returns:
      Batch of numpy arrays.
    """
    B, T, P = len(rows), shape.tokens, shape.patches
    arrays: dict[str, Any] = {
        "tokens": np.zeros((B, T), np.int32),
        "targets": np.zeros((B, T), np.int32),
        "loss_weights": np.zeros((B, T), np.float32),
        "positions": np.zeros((B, T), np.int32),
        "segment_ids": np.zeros((B, T), np.int32),
        "image_ids": np.zeros((B, T), np.int32),
        "image_slots": np.full((B, T), -1, np.int32),
        "patches": np.zeros((B, P, shape.patch_dim), np.uint8),
        "patch_positions": np.full((B, P, 2), -1, np.int32),
        "patch_image_ids": np.zeros((B, P), np.int32),
    }
    for b, examples in enumerate(rows):
        row = {name: array[b] for name, array in arrays.items()}
        _write_text(row, examples)
        _write_images(row, [image for example in examples for image in example.images], image_token)
    return Batch(**arrays)


def _write_text(row: dict[str, np.ndarray], examples: Sequence[Example]) -> None:
    start = 0
    for segment, example in enumerate(examples, start=1):
        n = len(example.tokens)
        row["tokens"][start : start + n] = example.tokens
        row["targets"][start : start + n - 1] = example.tokens[1:]
        row["loss_weights"][start : start + n - 1] = example.carries_loss[1:]
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


def add_sounds(batch: Batch, rows: Sequence[Sequence[Example]], audio_token: int) -> Batch:
    """The batch that was assembled from these rows, with their sounds, each of which gets room for the longest.

    Args:
      batch: without sounds; it stays as it is if there is nothing to hear.
      rows: as in `assemble`.
      audio_token: id of the placeholder.
    """
    sounds = [[sound for example in examples for sound in example.sounds] for examples in rows]
    longest = max((sound for row in sounds for sound in row), key=len, default=())
    if not len(longest):
        return batch
    shape = (len(rows), max(map(len, sounds)))
    arrays: dict[str, Any] = {
        "audio_features": np.zeros((*shape, *np.shape(longest)), np.float32),
        "audio_lengths": np.zeros(shape, np.int32),
        "audio_slots": np.full(np.shape(batch.tokens), -1, np.int32),
    }
    room = num_soft_tokens(len(longest))
    for b, row in enumerate(sounds):
        is_soft_token = np.asarray(batch.tokens)[b] == audio_token
        places = [a * room + np.arange(num_soft_tokens(len(sound))) for a, sound in enumerate(row)]
        arrays["audio_slots"][b, is_soft_token] = np.concatenate(places) if row else ()
        for a, sound in enumerate(row):
            arrays["audio_features"][b, a, : len(sound)] = sound
            arrays["audio_lengths"][b, a] = len(sound)
    return dataclasses.replace(batch, **arrays)


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
