"""`Batch`: what a Gemma 4 reads, as packed rows of static shape."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows; one row holds whole documents one after another, and their images likewise.

    Letters: B rows, T tokens, P patches, k = pooling size.
    A text-only batch has P = 0, and one without sounds has None for the three fields about them. Leaves are numpy
    arrays on the host and jax.Arrays on devices. A sounds, F frames of the longest, M mel bins.

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
      audio_features: [B, A, F, M] float32, log-mel features of each sound of the row, zero behind its end.
      audio_lengths: [B, A] int32, frames of each sound; 0 is none.
      audio_slots: [B, T] int32: which soft token of the row stands here, -1 is none. Those of sound a begin at
        a * ceil(F / 4), as every sound is given room for the longest.
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
    audio_features: jax.Array | None = None
    audio_lengths: jax.Array | None = None
    audio_slots: jax.Array | None = None
