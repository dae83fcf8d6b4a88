"""`Batch`: what a Gemma 4 reads, as packed rows of static shape."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows; one row holds whole documents one after another, and their images and sounds likewise.

    Letters: B rows, T tokens, P patches, F frames, M mel bins, k = pooling size. A batch without images has P = 0, one
    without sounds F = 0. Leaves are numpy arrays on the host and jax.Arrays on devices; `FIELDS` has their dimensions,
    dtypes and padding.

    Attributes:
      tokens: [B, T] int32 input ids; image placeholders hold the image token id, padding 0.
      targets: [B, T] int32, the token that follows each position in its document.
      loss_weights: [B, T] float32; 0 on padding, at the end of a document, and where a placeholder or an
        unweighted token would be predicted.
      positions: [B, T] int32, restarting at 0 with each document.
      segment_ids: [B, T] int32, counting documents from 1; 0 is padding.
      image_ids: [B, T] int32: at a soft token the image of this row it belongs to, from 1; elsewhere 0.
      image_slots: [B, T] int32: which soft token of the row stands here, from 0; -1 is text.
      patches: [B, P, 3 * patch_size**2] uint8, flattened (row, column, channel). The k * k patches that pool into
        one soft token are neighbours: patches m * k * k to (m + 1) * k * k - 1 make soft token m of the row. Cells
        of an image come in raster order, and so do the patches of a cell.
      patch_positions: [B, P, 2] int32 (x, y) in patches; (-1, -1) is padding.
      patch_image_ids: [B, P] int32, the image of this row a patch belongs to, from 1; 0 is padding.
      audio_features: [B, F, M] float32, log-mel features. The frames 4 m to 4 m + 3 make soft token m of the row. A
        sound begins at a multiple of 4, with two frames of none before it at least, or at the beginning of the row.
      frame_sound_ids: [B, F] int32, the sound of this row a frame belongs to, from 1; 0 is none.
      audio_slots: [B, T] int32: which soft token of the row's sounds stands here, from 0; -1 is none.
    """

    tokens: jax.Array
    targets: jax.Array
    loss_weights: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    image_ids: jax.Array
    image_slots: jax.Array
    patches: jax.Array
    patch_positions: jax.Array
    patch_image_ids: jax.Array
    audio_features: jax.Array
    frame_sound_ids: jax.Array
    audio_slots: jax.Array

    def map_tokens(self, function: Callable[[jax.Array], jax.Array]) -> "Batch":
        """With a function of every array that has a token at each place."""
        names = [name for name, field in FIELDS.items() if field.dims == _TOKENS]
        return dataclasses.replace(self, **{name: function(getattr(self, name)) for name in names})


class Field(NamedTuple):
    """One array of a Batch.

    Attributes:
      dims: logical axes, by which `sharding` spreads it.
      dtype: of its values.
      padding: the value of what is not there.
    """

    dims: tuple[str, ...]
    dtype: type[np.generic]
    padding: int = 0


_TOKENS, _PATCHES, _FRAMES = ("batch", "length"), ("batch", "patches"), ("batch", "frames")

FIELDS = {
    "tokens": Field(_TOKENS, np.int32),
    "targets": Field(_TOKENS, np.int32),
    "loss_weights": Field(_TOKENS, np.float32),
    "positions": Field(_TOKENS, np.int32),
    "segment_ids": Field(_TOKENS, np.int32),
    "image_ids": Field(_TOKENS, np.int32),
    "image_slots": Field(_TOKENS, np.int32, padding=-1),
    "patches": Field((*_PATCHES, "patch"), np.uint8),
    "patch_positions": Field((*_PATCHES, "xy"), np.int32, padding=-1),
    "patch_image_ids": Field(_PATCHES, np.int32),
    "audio_features": Field((*_FRAMES, "mel"), np.float32),
    "frame_sound_ids": Field(_FRAMES, np.int32),
    "audio_slots": Field(_TOKENS, np.int32, padding=-1),
}
"""THE table of the arrays of a Batch, by name."""


def padding(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The arrays of a batch that holds nothing, to be written into.

    Args:
      sizes: dimension -> size, for all dimensions of `FIELDS` but "xy".
    """
    given = {**sizes, "xy": 2}
    return {
        name: np.full([given[dim] for dim in field.dims], field.padding, field.dtype) for name, field in FIELDS.items()
    }


def sizes_of(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Dimension -> size, of the arrays of a batch by name."""
    return {
        dim: size for name, field in FIELDS.items() for dim, size in zip(field.dims, arrays[name].shape, strict=True)
    }
