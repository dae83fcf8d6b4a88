"""One shard of prepared data: neighbouring documents of a source, encoded.

Neighbours, so that the source is read in the order of its files, once. A shard is written beside its place, renamed,
and marked as done.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.data.example import SizedExample, SizedImage, SizedSound, Unreadable
from gemma4_jax.data.mixture import Examples
from gemma4_jax.data.prepared import Shard, array_record, damage, to_record, unreadable_record
from gemma4_jax.data.tally import COUNTERS, MAX_NAMED, Judge, Tally
from gemma4_jax.errors import InputError
from gemma4_jax.files import checksum, write_atomically

_TEXT_OPTIONS = "group_size:1,zstd:1"
"""A random document costs the reading of itself alone, and takes a third of the disk: 0.03 ms against 0.01."""

PARTS = ".part-"
"""How the folder begins in which a shard is written before it has its place."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard of one side of a source.

    Attributes:
      source: its name.
      side: of its split.
      shard: where its files go.
      start, stop: the documents that it takes.
    """

    source: str
    side: str
    shard: Shard
    start: int
    stop: int

    def done(self) -> dict[str, Any] | None:
        """What was written of it when it was done; None if it is not, or its files are not what they were."""
        try:
            known = json.loads(self.shard.done.read_bytes())
            is_whole = known["documents"] == self.stop - self.start and damage(self.shard, known) is None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return known if is_whole else None


@dataclasses.dataclass
class ShardWriter:
    """Prepares shards, in any process.

    Attributes:
      examples: (source, side) -> its documents, encoded.
      max_left_out: share of the documents of a source that may be left out.
    """

    examples: Mapping[tuple[str, str], Examples]
    max_left_out: float

    def __post_init__(self) -> None:
        self._judge = Judge(self.max_left_out)

    def __call__(self, task: Task, count: Callable[[], None]) -> None:
        """Prepares a shard, unless another process has.

        Args:
          task: the shard.
          count: called after each document.
        Raises:
          InputError: too many documents are left out, or the files cannot be written.
        """
        if task.done() is not None:
            return
        try:
            task.shard.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=PARTS, dir=task.shard.folder, ignore_cleanup_errors=True
            ) as temporary:
                self._write(task, dataclasses.replace(task.shard, folder=Path(temporary)), count)
        except (FileNotFoundError, InputError):
            if task.done() is None:  # else another process was faster, and has cleaned up
                raise

    def _write(self, task: Task, shard: Shard, count: Callable[[], None]) -> None:
        """Writes the files of a shard elsewhere, moves them to their places, and marks it as done."""
        tally = self._judge.tally()
        left_out: list[str] = []
        examples = self.examples[task.source, task.side]
        writer = array_record().ArrayRecordWriter(str(shard.text), _TEXT_OPTIONS)
        with shard.media.open("wb") as media:
            for i in range(task.start, task.stop):
                record, reason = _encode(examples[i], media, tally, task.source)
                writer.write(record)
                left_out += [reason] if reason and len(left_out) < MAX_NAMED else []
                count()
        writer.close()
        _check_written(shard, task.stop - task.start)
        known = {
            "side": task.side,
            "documents": task.stop - task.start,
            "files": {name: _written(path) for name, path in shard.files().items()},
            "counters": tally.counters.get(task.source, dict.fromkeys(COUNTERS, 0)),
            "left_out": left_out,
        }
        for name, path in shard.files().items():
            path.replace(task.shard.files()[name])
        write_atomically(task.shard.done, json.dumps(known, indent=1) + "\n")


def _encode(example: SizedExample | Unreadable, media: Any, tally: Tally, source: str) -> tuple[bytes, str]:
    """Writes what the towers read of a document, and counts what becomes of it.

    Returns:
      (its record, why it is left out: empty if it is not).
    """
    if isinstance(example, Unreadable):
        tally.leave_out(source, "unreadable", example.reason)
        return unreadable_record(example.reason), example.reason
    places: list[tuple[int, str]] = []
    num_missing, damaged = example.text.images_missing, ""
    for medium in example.media:
        try:
            array = medium.read() if isinstance(medium, SizedSound) else medium.read().patches
            places.append((media.tell(), ""))
            media.write(np.ascontiguousarray(array).data)
        except InputError as error:
            places.append((0, str(error).removeprefix(f"{medium.name}: ")))  # it is named when it is read
            if isinstance(medium, SizedImage) and medium.may_be_missing:
                num_missing += 1
            else:
                damaged = damaged or f"{example.text.name}: {error}"
    try:
        record = to_record(example, places)
    except InputError as error:
        damaged, record = str(error), unreadable_record(str(error))
    if damaged:
        tally.leave_out(source, "unreadable", damaged)
    else:
        num_images = len(example.images) - num_missing + example.text.images_missing
        tally.accept(source, documents=1, images=num_images, images_missing=num_missing)
    return record, damaged


def _check_written(shard: Shard, num_documents: int) -> None:
    """ArrayRecord says nothing of a disk that is full."""
    reader = array_record().ArrayRecordReader(str(shard.text))
    if not reader.ok() or reader.num_records() != num_documents:
        raise InputError(f"{shard.text} cannot be written whole: make room on its disk.")


def _written(path: Path) -> dict[str, int]:
    """The size and the checksum of a file, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}
