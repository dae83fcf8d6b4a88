"""Packed rows to a `Batch`, and how full it is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

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
        "image_patches": np.full((B, shape.images, shape.patches_per_image), -1, np.int32),
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
        row["image_patches"][i, : stop - start] = np.arange(start, stop)
        start = stop


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
