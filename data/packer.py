"""A sequence of documents to packed rows, one after another.

- A row is chosen among the `LOOKAHEAD` documents that have waited longest, by their sizes alone; only then are its
  images and sounds decoded. Nothing waits forever, and the order depends on nothing but the order of the documents.
- A document of which an image or a sound proves damaged when its row is made leaves its place in that row empty.
- What becomes of documents is counted by source (`tally.COUNTERS`).
"""

import dataclasses
import itertools
from typing import Any, Protocol

import numpy as np

from gemma4_jax.data.cache import Cache
from gemma4_jax.data.example import Example, SizedExample, Unreadable
from gemma4_jax.data.pack import Fit, RowShape, Rules, Size, choose, fit, size_of
from gemma4_jax.data.tally import Tally
from gemma4_jax.errors import InputError

LOOKAHEAD = 128
"""Documents among which a row chooses, at most."""

ROWS_AHEAD = 2
"""The look-ahead grows by so many rows of tokens with each row: the first does not wait until all of it is read."""

WAITING_BYTES = 2**25
"""Of the files of images and sounds that wait: with so many, no more are read ahead."""


class Documents(Protocol):
    """Encoded documents by index; None where there is none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SizedExample | Unreadable | None: ...


@dataclasses.dataclass
class _Waiting:
    """A document that waits for a row, or a piece of one.

    Attributes:
      index: of the document.
      piece: of its pieces, from 0.
      size: in a row.
      num_bytes: of what is held of it.
      example: None where it is to be read again, as it is after a restart.
    """

    index: int
    piece: int
    size: Size
    num_bytes: int
    example: SizedExample | None


class Packer:
    """Packs documents into rows.

    The state says which documents wait, and how large they are: restored, it goes on exactly, and reads nothing until
    their rows come.

    Args:
      documents: in the order in which they are packed.
      shape: of a row.
      rules: what becomes of documents that do not fit.
      tally: counts what becomes of documents.
      cache: keeps what their files become; None if nothing does.
    """

    def __init__(
        self, documents: Documents, shape: RowShape, rules: Rules, tally: Tally, cache: Cache | None = None
    ) -> None:
        self._documents = documents
        self._shape = shape
        self._rules = rules
        self._tally = tally
        self._cache = cache
        self._next = 0
        self._num_rows = 0
        self._waiting: list[_Waiting] = []

    def next_row(self) -> list[Example] | None:
        """The examples of the next row, with their images and sounds; None when no document is left.

        Raises:
          InputError: too many documents are left out, or one that waited is no longer what it was.
        """
        while True:
            while self._has_room_to_wait() and (pieces := self._read_document()):
                self._waiting += pieces
            if not self._waiting:
                return None
            window = self._waiting[:LOOKAHEAD]
            chosen = choose(np.array([waiting.size for waiting in window]), np.array(self._shape.space()))
            for i in sorted(chosen, reverse=True):
                del self._waiting[i]
            self._num_rows += 1
            row = [example for i in chosen if (example := self._read(window[i])) is not None]
            if row:
                return row

    def _has_room_to_wait(self) -> bool:
        return (
            len(self._waiting) < LOOKAHEAD
            and sum(waiting.num_bytes for waiting in self._waiting) < WAITING_BYTES
            and sum(waiting.size[0] for waiting in self._waiting)
            < ROWS_AHEAD * (self._num_rows + 1) * self._shape.tokens
        )

    def _read_document(self) -> list[_Waiting]:
        """The pieces of the next usable document; none at the end of the data."""
        while self._next < len(self._documents):
            index, example = self._next, self._documents[self._next]
            self._next += 1
            if example is None:
                continue
            fitted = self._fit(example)
            if isinstance(example, Unreadable):
                self._tally.leave_out(example.source, fitted.counter, fitted.reason)
            elif not fitted.pieces:
                self._tally.leave_out(example.text.source, fitted.counter, fitted.reason)
            else:
                what = {fitted.counter: 1} if fitted.counter else {}
                self._tally.accept(example.text.source, images_missing=example.text.images_missing, **what)
                return [_Waiting(index, i, size_of(p), p.num_bytes, p) for i, p in enumerate(fitted.pieces)]
        return []

    def _fit(self, example: SizedExample | Unreadable) -> Fit:
        return fit(example, self._shape, long_masked=self._rules.long_masked)

    def _read(self, waiting: _Waiting) -> Example | None:
        """The example with its images and sounds; None if it is left out after all."""
        sized = waiting.example or self._read_again(waiting)
        if sized is None:
            return None
        source = sized.text.source
        try:
            example = sized.read(self._cache)
        except InputError as error:
            self._tally.leave_out(source, "unreadable", str(error), read=0)
            return None
        num_missing = example.images_missing - sized.text.images_missing
        is_first = int(waiting.piece == 0)
        self._tally.add(source, documents=is_first, images=len(example.images), images_missing=num_missing)
        return example

    def _read_again(self, waiting: _Waiting) -> SizedExample | None:
        """What waited when the state was saved; None if it has changed, and may."""
        example = self._documents[waiting.index]
        if example is None:  # its source has dropped out of the mixture: the data is another
            example = Unreadable(f"document {waiting.index} is not there any more.")
        fitted = self._fit(example)
        pieces = dict(enumerate(fitted.pieces))
        for other in self._waiting:  # the other pieces of a long text, which takes long to read
            piece = pieces.get(other.piece) if other.index == waiting.index else None
            if piece is not None and size_of(piece) == other.size:
                other.example = piece
        found = pieces.get(waiting.piece)
        if found is not None and size_of(found) == waiting.size:
            return found
        source = example.source if isinstance(example, Unreadable) else example.text.source
        reason = fitted.reason or f"{fitted.pieces[0].text.name}: it has another length."
        if not self._rules.allow_changes:
            raise InputError(
                f"The data is not what it was when this run was saved: a document of {source!r} that waited for its "
                f"row can no longer be used ({reason.removesuffix('.')}): restore it, or go on without it with "
                "data.allow_changes=true."
            )
        self._tally.add(source, **{fitted.counter if not fitted.pieces else "unreadable": 1})
        self._tally.name(source, reason)
        return None

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes, to be kept as JSON. It does not grow with the pieces of a text."""
        groups = itertools.groupby(self._waiting, key=lambda waiting: (waiting.index, waiting.size, waiting.num_bytes))
        lines = []
        for (index, size, num_bytes), group in groups:
            pieces = [waiting.piece for waiting in group]
            for start, stop in _to_ranges(pieces):
                lines.append(" ".join(map(str, (index, start, stop, *size, num_bytes))))
        # One text, for it is copied with every batch.
        waiting = ";".join(lines)
        return {"next": self._next, "rows": self._num_rows, "waiting": waiting, "tally": self._tally.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a `get_state`."""
        self._next, self._num_rows = int(state["next"]), int(state["rows"])
        self._tally.set_state(state["tally"])
        self._waiting = []
        for line in filter(None, state["waiting"].split(";")):
            index, start, stop, tokens, images, patches, frames, num_bytes = map(int, line.split(" "))
            size = tokens, images, patches, frames
            self._waiting += [_Waiting(index, piece, size, num_bytes, None) for piece in range(start, stop)]


def _to_ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as [start, stop) ranges."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = ranges[-1][0], number + 1
        else:
            ranges.append((number, number + 1))
    return ranges
