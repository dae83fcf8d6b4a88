"""What a row has room for, which documents fit, and which of them make a row together.

Rules:
- A row takes whole examples while tokens, images, patches and frames last: first the oldest that waits, then again and
  again the one after which least is left (`choose`).
- Plain text longer than a row is split into pieces of a row each; the last is as long as it comes.
- A longer document with images, or with text that carries no loss, is never cut into pieces, which could part a
  question from its image or its answer: it is left out, or its context is cut (`fit`).
- A document of which nothing carries loss is left out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma4_jax.audio.features import num_frame_places
from gemma4_jax.config import Gemma4Config
from gemma4_jax.data.example import Example, SizedExample, Unreadable
from gemma4_jax.errors import InputError
from gemma4_jax.fields import require
from gemma4_jax.run_config import DataConfig


@dataclasses.dataclass(frozen=True)
class RowShape:
    """What one packed row has room for.

    Attributes:
      tokens: T.
      images: I.
      patches: P, a multiple of the patches of a cell.
      patch_dim: numbers in one patch.
      frames: F, whole soft tokens.
      mel_bins: numbers in one frame.
    """

    tokens: int
    images: int
    patches: int
    patch_dim: int
    frames: int = 0
    mel_bins: int = 0

    def sizes(self) -> dict[str, int]:
        """The sizes of a row, by the dimensions of `batch.FIELDS`."""
        return {
            "length": self.tokens,
            "patches": self.patches,
            "patch": self.patch_dim,
            "frames": self.frames,
            "mel": self.mel_bins,
        }

    @classmethod
    def from_config(cls, data: DataConfig, model: Gemma4Config) -> "RowShape":
        """The row that a resolved config describes for a model.

        Raises:
          InputError: a row could not hold one image of the budget, or the model could not read it.
        """
        tokens, budget = data.seq_len, data.soft_tokens_per_image
        longest = f"at most model.text.max_positions={model.text.max_positions}"
        require(tokens <= model.text.max_positions, "data.seq_len", tokens, longest)
        of_sounds = {"frames": data.frames_per_row, "mel_bins": model.audio.num_mel_bins if model.audio else 0}
        none = "0, as the model has no audio tower (model.audio is empty)"
        require(not data.frames_per_row or model.audio is not None, "data.frames_per_row", data.frames_per_row, none)
        if model.vision is None or data.images_per_row == 0:
            return cls(tokens, 0, 0, model.vision.patch_dim if model.vision else 0, **of_sounds)
        cell, longest_side = model.vision.pooling_size**2, budget * model.vision.pooling_size
        largest = budget * cell
        if tokens < budget + 4:
            raise InputError(
                f"data.seq_len={tokens} is shorter than one image: with data.soft_tokens_per_image={budget} it must "
                f"be at least {budget + 4}, for the image, its two marks, <bos> and <eos>."
            )
        room = f"a multiple of {cell}, the patches of a soft token, and at least {largest}, those of the largest image"
        is_room = data.patches_per_row >= largest and data.patches_per_row % cell == 0
        require(is_room, "data.patches_per_row", data.patches_per_row, room)
        if longest_side > model.vision.num_positions:
            raise InputError(
                f"data.soft_tokens_per_image={budget} lets an image be {longest_side} patches long, but the vision "
                f"tower has model.vision.num_positions={model.vision.num_positions}: choose a smaller budget."
            )
        return cls(tokens, data.images_per_row, data.patches_per_row, model.vision.patch_dim, **of_sounds)

    def holds(self, example: SizedExample) -> bool:
        """Whether an example fits in an empty row."""
        return _fits(size_of(example), self.space())

    def space(self) -> "Size":
        """What an empty row has room for."""
        return self.tokens, self.images, self.patches, self.frames


Size = tuple[int, int, int, int]
"""(tokens, images, patches, frames)."""


def size_of(example: Example | SizedExample) -> Size:
    """What an example takes of a row."""
    if isinstance(example, SizedExample):
        tokens, sounds = example.text.tokens, [sound.num_frames for sound in example.sounds]
    else:
        tokens, sounds = example.tokens, [len(sound) for sound in example.sounds]
    patches = sum(image.num_patches for image in example.images)
    return len(tokens), len(example.images), patches, sum(map(num_frame_places, sounds))


def _fits(size: Sequence[int], space: Sequence[int]) -> bool:
    return all(used <= left for used, left in zip(size, space, strict=True))


@dataclasses.dataclass(frozen=True)
class Rules:
    """What becomes of documents that cannot be trained on as they are; `config.data` has the same fields.

    Attributes:
      long_masked: "drop" or "cut_context".
      max_left_out: share of a source's documents that may be left out.
      allow_changes: whether documents that are not what they were may be left out of a resumed run.
    """

    long_masked: str = "drop"
    max_left_out: float = 0.5
    allow_changes: bool = False

    @classmethod
    def from_config(cls, data: DataConfig) -> "Rules":
        """The rules that a config gives."""
        return cls(data.long_masked, data.max_left_out, data.allow_changes)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A document as far as rows can hold it.

    Attributes:
      pieces: examples that each fit in a row; none if the document is left out.
      counter: of `tally.COUNTERS`, what became of it; empty for one that is packed whole.
      reason: why it is left out, one sentence that names it.
    """

    pieces: tuple[SizedExample, ...]
    counter: str = ""
    reason: str = ""


def fit(example: SizedExample | Unreadable, shape: RowShape, *, long_masked: str) -> Fit:
    """Makes a document fit in rows: as it is, in pieces, shortened, or not at all.

    Args:
      example: a whole document.
      shape: of a row.
      long_masked: what becomes of text longer than a row of which a part carries no loss: "drop", or "cut_context":
        as many tokens as are too many are cut from the left of `Example.context`, if it has so many.
    """
    if isinstance(example, Unreadable):
        return Fit((), "unreadable", example.reason)
    text = example.text
    if not text.carries_loss[1:].any():
        return Fit((), "nothing_to_learn", f"{text.name}: nothing to learn, for no text in it carries loss.")
    if shape.holds(example):
        return Fit((example,))
    tokens, *media = size_of(example)
    is_text = not any(media)
    if is_text and text.carries_loss[1:].all():
        pieces = tuple(_take(text, slice(start, start + shape.tokens)) for start in range(0, tokens, shape.tokens))
        return Fit(pieces, "split")
    excess, hint = tokens - shape.tokens, "."
    if is_text and long_masked == "cut_context" and excess <= text.context:
        return Fit((_take(text, np.r_[0, 1 + excess : tokens]),), "shortened")
    if is_text:
        hint = ", and text of which a part carries no loss is not split; see data.long_masked."
    images, patches, frames = media
    size = f"{tokens} tokens, {images} images and {patches} patches"
    space = f"data.seq_len={shape.tokens}, data.images_per_row={shape.images}, data.patches_per_row={shape.patches}"
    if frames:
        size, space = f"{size}, with {frames} frames of sounds,", f"{space}, data.frames_per_row={shape.frames}"
    return Fit((), "dropped", f"{text.name}: {size} do not fit in a row ({space}){hint}")


def _take(text: Example, which: Any) -> SizedExample:
    """The example with the tokens that `which` indexes."""
    taken = dataclasses.replace(text, tokens=text.tokens[which], carries_loss=text.carries_loss[which])
    return SizedExample(taken)


def choose(sizes: np.ndarray, room: np.ndarray) -> list[int]:
    """Which examples make a row: the first, then again and again, of those that fit, the one after which least is left.

    What is left is the sum of the fourth powers of the shares of free tokens, patches and frames: mostly the largest
    share. To take the longest would spend text on rows whose patches are gone, until only images wait, and rows lack
    patches for their tokens. When the row is full, the one of the chosen is exchanged for which others fill it better.

    Args:
      sizes: [n, 4] ints, `Size` of each, n > 0; the first fits.
      room: [4], that of an empty row.
    Returns:
      Indices, in the order in which they were chosen.
    """
    shared = [i for i in (0, 2, 3) if room[i]]

    def left(space: np.ndarray) -> np.ndarray:
        return ((space[..., shared] / room[shared]) ** 4).sum(axis=-1)

    def fill(chosen: list[int], without: list[int]) -> tuple[float, list[int]]:
        space = room - sizes[chosen].sum(axis=0)
        fitting = np.delete(np.arange(len(sizes)), chosen + without)
        while len(fitting := fitting[(sizes[fitting] <= space).all(axis=1)]):
            best = int(np.argmin(left(space - sizes[fitting])))
            chosen = [*chosen, int(fitting[best])]
            space, fitting = space - sizes[fitting[best]], np.delete(fitting, best)
        return float(left(space)), chosen

    full = fill([0], [])
    exchanged = (fill([i for i in full[1] if i != out], [out]) for out in full[1][1:])
    return next((other for other in exchanged if other[0] < full[0]), full)[1]
