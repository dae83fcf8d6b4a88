"""Examples to packed rows.

Rules:
- A row takes whole examples while tokens, images and patches last: first the oldest that waits, then again and again
  the longest that fits among the next `LOOKAHEAD`. Nothing waits forever, and the order depends on nothing but the
  order of the examples.
- Text longer than a row is split into pieces of a row each; the last is as long as it comes.
- A document with images that does not fit in a row is dropped: to cut it could part a question from its image.
- Split, dropped and unreadable documents are counted (`COUNTERS`).
"""

import dataclasses
import itertools
import logging
from typing import Any

import grain

from gemma4_jax.config import Gemma4Config
from gemma4_jax.data.tokenize import Example, Unreadable
from gemma4_jax.errors import InputError
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

LOOKAHEAD = 32
"""Examples among which a row chooses."""

MAX_UNUSABLE_RUN = 100
"""So many unusable documents one after another are taken for a fault of the data as a whole."""

MAX_WARNINGS = 20
"""Dropped documents, and unreadable ones, that are named in the log; the rest are only counted."""

COUNTERS = ("documents", "images", "split", "dropped", "unreadable")
"""What an iterator counts: documents and images packed; documents split, dropped, and not readable."""


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
    def from_config(cls, data: Any, model: Gemma4Config) -> "RowShape":
        """The row that `config.data` describes for a model.

        Raises:
          InputError: if a row could not hold one image of the budget, or the model could not read it.
        """
        tokens, images, budget = data.seq_len, data.images_per_row, data.soft_tokens_per_image
        if not 2 <= tokens <= model.text.max_positions:
            longest = f"2 and model.text.max_positions={model.text.max_positions}"
            raise InputError(f"data.seq_len={tokens} is not possible: it must be between {longest}.")
        if model.vision is None or images == 0:
            return cls(tokens, 0, 0, model.vision.patch_dim if model.vision else 0)
        if budget not in SOFT_TOKEN_BUDGETS:
            accepted = ", ".join(map(str, SOFT_TOKEN_BUDGETS))
            raise InputError(f"data.soft_tokens_per_image={budget} is not possible: it must be one of {accepted}.")
        cell, longest_side = model.vision.pooling_size**2, budget * model.vision.pooling_size
        largest = budget * cell
        shape = cls(tokens, images, data.patches_per_row, model.vision.patch_dim)
        if tokens < budget + 4:
            raise InputError(
                f"data.seq_len={tokens} is shorter than one image: with data.soft_tokens_per_image={budget} it must "
                f"be at least {budget + 4}, for the image, its two marks, <bos> and <eos>."
            )
        if shape.patches < largest or shape.patches % cell:
            raise InputError(
                f"data.patches_per_row={shape.patches} is not possible: it must be a multiple of {cell}, the patches "
                f"of a soft token, and at least {largest}, the patches of the largest image."
            )
        if longest_side > model.vision.num_positions:
            raise InputError(
                f"data.soft_tokens_per_image={budget} lets an image be {longest_side} patches long, but the vision "
                f"tower has model.vision.num_positions={model.vision.num_positions}: choose a smaller budget."
            )
        return shape

    def holds(self, example: Example) -> bool:
        """Whether an example fits in an empty row."""
        return _fits(size_of(example), (self.tokens, self.images, self.patches))

    def split(self, example: Example) -> list[Example]:
        """The example itself if a row can hold it; else its pieces if it is text; else nothing."""
        if self.holds(example):
            return [example]
        if example.images:
            return []
        cuts = range(0, len(example.tokens), self.tokens)
        return [
            dataclasses.replace(
                example,
                tokens=example.tokens[cut : cut + self.tokens],
                carries_loss=example.carries_loss[cut : cut + self.tokens],
            )
            for cut in cuts
        ]


def size_of(example: Example) -> tuple[int, int, int]:
    """(tokens, images, patches) of an example."""
    return len(example.tokens), len(example.images), sum(len(image.patches) for image in example.images)


def _fits(size: tuple[int, ...], space: tuple[int, ...]) -> bool:
    return all(used <= left for used, left in zip(size, space, strict=True))


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """An example that waits for a row, and how to read it again: the parent's state before it, and which piece."""

    example: Example
    size: tuple[int, int, int]
    parent_state: Any
    piece: int


class PackIterDataset(grain.IterDataset):
    """Packs the examples of `parent` into rows: each element is a list of examples that fit in one row.

    The iterator's state holds no examples, only where to read again those that wait; restored, it goes on exactly.

    Args:
      parent: yields `Example` or `Unreadable`.
      shape: of a row.
    """

    def __init__(self, parent: grain.IterDataset, shape: RowShape) -> None:
        super().__init__(parent)
        self._shape = shape

    def __iter__(self) -> "PackIterator":
        return PackIterator(self._parent.__iter__(), self._shape)


class PackIterator(grain.DatasetIterator):
    """Iterator of `PackIterDataset`."""

    def __init__(self, parent: grain.DatasetIterator, shape: RowShape) -> None:
        super().__init__(parent)
        self._shape = shape
        self._waiting: list[_Waiting] = []
        self._counters = dict.fromkeys(COUNTERS, 0)

    def __next__(self) -> list[Example]:
        while len(self._waiting) < LOOKAHEAD and (pieces := self._read_document()):
            self._waiting += pieces
        if not self._waiting:
            raise StopIteration
        row: list[Example] = []
        space: tuple[int, ...] = (self._shape.tokens, self._shape.images, self._shape.patches)
        chosen: int | None = 0
        while chosen is not None:
            waiting = self._waiting.pop(chosen)
            row.append(waiting.example)
            space = tuple(left - used for left, used in zip(space, waiting.size, strict=True))
            fitting = [i for i, other in enumerate(self._waiting[:LOOKAHEAD]) if _fits(other.size, space)]
            chosen = max(fitting, key=lambda i: self._waiting[i].size[0], default=None)
            self._counters["documents"] += waiting.piece == 0
            self._counters["images"] += waiting.size[1]
        return row

    def _read_document(self) -> list[_Waiting]:
        """The pieces of the next usable document; none at the end of the data."""
        for _ in range(MAX_UNUSABLE_RUN):
            parent_state = self._parent.get_state()
            try:
                example = next(self._parent)
            except StopIteration:
                return []
            if isinstance(example, Unreadable):
                reason, counter = example.reason, "unreadable"
            elif pieces := self._shape.split(example):
                self._counters["split"] += len(pieces) > 1
                return [_Waiting(piece, size_of(piece), parent_state, i) for i, piece in enumerate(pieces)]
            else:
                reason, counter = self._does_not_fit(example), "dropped"
            self._counters[counter] += 1
            if self._counters[counter] <= MAX_WARNINGS:
                logging.warning("Skipped a document: %s", reason)
        raise InputError(f"{MAX_UNUSABLE_RUN} documents one after another cannot be used; the last: {reason}")

    def _does_not_fit(self, example: Example) -> str:
        tokens, images, patches = size_of(example)
        return (
            f"{example.name}: {tokens} tokens, {images} images and {patches} patches do not fit in a row "
            f"(data.seq_len={self._shape.tokens}, data.images_per_row={self._shape.images}, data.patches_per_row="
            f"{self._shape.patches})."
        )

    def get_state(self) -> dict[str, Any]:
        return {
            "parent": self._parent.get_state(),
            "waiting": [{"parent": waiting.parent_state, "piece": waiting.piece} for waiting in self._waiting],
            "counters": dict(self._counters),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._waiting = []
        for parent_state, entries in itertools.groupby(state["waiting"], key=lambda entry: entry["parent"]):
            self._parent.set_state(parent_state)
            example = next(self._parent)
            pieces = self._shape.split(example) if isinstance(example, Example) else []
            for piece in (entry["piece"] for entry in entries):
                if piece >= len(pieces):
                    raise InputError(
                        "The data is not what it was when this run was saved: restore it, or start another run."
                    )
                self._waiting.append(_Waiting(pieces[piece], size_of(pieces[piece]), parent_state, piece))
        self._parent.set_state(state["parent"])
        self._counters = dict(state["counters"])
