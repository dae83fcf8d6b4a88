"""Examples to packed rows.

Rules:
- A row takes whole examples while tokens, images, patches and frames last: first the oldest that waits, then again and
  again the one among the next `LOOKAHEAD` after which least is left (`choose`). Nothing waits forever, and the order
  depends on nothing but the order of the examples.
- Plain text longer than a row is split into pieces of a row each; the last is as long as it comes.
- A longer document with images, or with text that carries no loss, is never cut into pieces, which could part a
  question from its image or its answer: it is left out, or its context is cut (`fit`).
- A document of which nothing carries loss is left out.
- What becomes of documents is counted by source (`tally.COUNTERS`).
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from gemma4_jax.audio.features import num_frame_places
from gemma4_jax.config import Gemma4Config
from gemma4_jax.data.encode import Example, Unreadable
from gemma4_jax.data.tally import Tally
from gemma4_jax.errors import InputError
from gemma4_jax.fields import require
from gemma4_jax.run_config import DataConfig

LOOKAHEAD = 128
"""Examples among which a row chooses, at most."""

WAITING_BYTES = 2**28
"""Of the patches of examples that wait: with so many, no more are read ahead. It is 34 images of 1,120 soft tokens."""


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
        if model.vision is None or data.images_per_row == 0:
            return cls(tokens, 0, 0, model.vision.patch_dim if model.vision else 0)
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
        return cls(tokens, data.images_per_row, data.patches_per_row, model.vision.patch_dim)

    def holds(self, example: Example) -> bool:
        """Whether an example fits in an empty row."""
        return _fits(size_of(example), self.space())

    def space(self) -> "Size":
        """What an empty row has room for."""
        return self.tokens, self.images, self.patches, self.frames


Size = tuple[int, int, int, int]
"""(tokens, images, patches, frames)."""


def size_of(example: Example) -> Size:
    """What an example takes of a row."""
    patches = sum(len(image.patches) for image in example.images)
    frames = sum(num_frame_places(len(sound)) for sound in example.sounds)
    return len(example.tokens), len(example.images), patches, frames


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

    pieces: tuple[Example, ...]
    counter: str = ""
    reason: str = ""


def fit(example: Example | Unreadable, shape: RowShape, *, long_masked: str) -> Fit:
    """Makes a document fit in rows: as it is, in pieces, shortened, or not at all.

    Args:
      example: a whole document.
      shape: of a row.
      long_masked: what becomes of text longer than a row of which a part carries no loss: "drop", or "cut_context":
        as many tokens as are too many are cut from the left of `Example.context`, if it has so many.
    """
    if isinstance(example, Unreadable):
        return Fit((), "unreadable", example.reason)
    if not example.carries_loss[1:].any():
        return Fit((), "nothing_to_learn", f"{example.name}: nothing to learn, for no text in it carries loss.")
    if shape.holds(example):
        return Fit((example,))
    tokens, *media = size_of(example)
    is_text = not any(media)
    if is_text and example.carries_loss[1:].all():
        pieces = tuple(_take(example, slice(start, start + shape.tokens)) for start in range(0, tokens, shape.tokens))
        return Fit(pieces, "split")
    excess, hint = tokens - shape.tokens, "."
    if is_text and long_masked == "cut_context" and excess <= example.context:
        return Fit((_take(example, np.r_[0, 1 + excess : tokens]),), "shortened")
    if is_text:
        hint = ", and text of which a part carries no loss is not split; see data.long_masked."
    images, patches, frames = media
    size = f"{tokens} tokens, {images} images and {patches} patches"
    space = f"data.seq_len={shape.tokens}, data.images_per_row={shape.images}, data.patches_per_row={shape.patches}"
    if frames:  # no field of `data` makes room for them yet
        size, space = f"{size}, with {frames} frames of sounds,", f"{space}, frames={shape.frames}"
    return Fit((), "dropped", f"{example.name}: {size} do not fit in a row ({space}){hint}")


def _take(example: Example, which: Any) -> Example:
    """The example with the tokens that `which` indexes."""
    return dataclasses.replace(example, tokens=example.tokens[which], carries_loss=example.carries_loss[which])


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """An example that waits for a row, and how to read it again: the parent's state before it, and which piece."""

    example: Example
    size: Size
    parent_state: Any
    piece: int


def choose(sizes: np.ndarray, room: np.ndarray) -> list[int]:
    """Which examples make a row: the first, then again and again, of those that fit, the one after which least is left.

    What is left is the sum of squares of the shares of free tokens, patches and frames. To take the longest would spend
    text on rows whose patches are gone, until only images wait, and rows lack patches for their tokens.

    Args:
      sizes: [n, 4] ints, `Size` of each, n > 0; the first fits.
      room: [4], that of an empty row.
    Returns:
      Indices, in the order in which they were chosen.
    """
    chosen, space = [0], room - sizes[0]
    shared = [i for i in (0, 2, 3) if room[i]]
    fitting = np.arange(1, len(sizes))
    while len(fitting := fitting[(sizes[fitting] <= space).all(axis=1)]):
        left = (space - sizes[fitting])[:, shared] / room[shared]
        best = int(np.argmin((left**2).sum(axis=1)))
        chosen.append(int(fitting[best]))
        space, fitting = space - sizes[chosen[-1]], np.delete(fitting, best)
    return chosen


class PackIterDataset(grain.IterDataset):
    """Packs the examples of `parent` into rows: each element is a list of examples that fit in one row.

    The iterator's state holds no examples, only where to read again those that wait; restored, it goes on exactly.

    Args:
      parent: yields `Example` or `Unreadable`.
      shape: of a row.
      rules: what becomes of documents that do not fit.
    """

    def __init__(self, parent: grain.IterDataset, shape: RowShape, rules: Rules) -> None:
        super().__init__(parent)
        self._shape = shape
        self._rules = rules

    def __iter__(self) -> "PackIterator":
        return PackIterator(self._parent.__iter__(), self._shape, self._rules)


class PackIterator(grain.DatasetIterator):
    """Iterator of `PackIterDataset`."""

    def __init__(self, parent: grain.DatasetIterator, shape: RowShape, rules: Rules) -> None:
        super().__init__(parent)
        self._shape = shape
        self._rules = rules
        self._waiting: list[_Waiting] = []
        self._tally = Tally(rules.max_left_out)

    def __next__(self) -> list[Example]:
        while self._has_room_to_wait() and (pieces := self._read_document()):
            self._waiting += pieces
        if not self._waiting:
            raise StopIteration
        window = self._waiting[:LOOKAHEAD]
        chosen = choose(np.array([waiting.size for waiting in window]), np.array(self._shape.space()))
        for i in sorted(chosen, reverse=True):
            del self._waiting[i]
        for i in chosen:
            self._tally.add(window[i].example.source, documents=int(window[i].piece == 0), images=window[i].size[1])
        return [window[i].example for i in chosen]

    def _has_room_to_wait(self) -> bool:
        patches = sum(waiting.size[2] for waiting in self._waiting)
        return len(self._waiting) < LOOKAHEAD and patches * self._shape.patch_dim < WAITING_BYTES

    def _read_document(self) -> list[_Waiting]:
        """The pieces of the next usable document; none at the end of the data."""
        while True:
            parent_state = self._parent.get_state()
            try:
                example = next(self._parent)
            except StopIteration:
                return []
            fitted = self._fit(example)
            if not fitted.pieces:
                self._tally.leave_out(example.source, fitted.counter, fitted.reason)
                continue
            self._tally.accept(example.source)
            assert isinstance(example, Example)
            self._tally.add(example.source, images_missing=example.images_missing)
            if fitted.counter:
                self._tally.add(example.source, **{fitted.counter: 1})
            return [_Waiting(piece, size_of(piece), parent_state, i) for i, piece in enumerate(fitted.pieces)]

    def _fit(self, example: Example | Unreadable) -> Fit:
        return fit(example, self._shape, long_masked=self._rules.long_masked)

    def get_state(self) -> dict[str, Any]:
        # A long text waits in thousands of pieces: its state is kept once, with the ranges of those that are left.
        documents = itertools.groupby(self._waiting, key=lambda waiting: waiting.parent_state)
        return {
            "parent": self._parent.get_state(),
            "waiting": [
                {"parent": state, "pieces": _to_ranges([waiting.piece for waiting in pieces])}
                for state, pieces in documents
            ],
            "tally": self._tally.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._tally.set_state(state["tally"])
        self._waiting = []
        for entry in state["waiting"]:
            self._parent.set_state(entry["parent"])
            self._waiting += self._read_again(entry["parent"], entry["pieces"])
        self._parent.set_state(state["parent"])

    def _read_again(self, parent_state: Any, ranges: list[list[int]]) -> list[_Waiting]:
        """The pieces of a document that waited for their rows when the state was saved."""
        example = next(self._parent)
        fitted = self._fit(example)
        if not fitted.pieces or any(stop > len(fitted.pieces) for _, stop in ranges):
            reason = fitted.reason or f"{example.name}: it is shorter than it was."
            if not self._rules.allow_changes:
                raise InputError(
                    f"The data is not what it was when this run was saved: a document of {example.source!r} that "
                    f"waited for its row can no longer be used ({reason.removesuffix('.')}): restore it, or go on "
                    "without it with data.allow_changes=true."
                )
            self._tally.add(example.source, **{fitted.counter or "unreadable": 1})
            self._tally.name(example.source, reason)
            return []
        pieces = (piece for start, stop in ranges for piece in range(start, stop))
        return [_Waiting(fitted.pieces[i], size_of(fitted.pieces[i]), parent_state, i) for i in pieces]


def _to_ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as [start, stop) ranges."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges
