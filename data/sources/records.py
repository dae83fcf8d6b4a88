"""Where the records of a JSON file lie: one a line, or the elements of one array. Files in other forms are refused."""

import array
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemma4_jax.data.sources.json_array import Record, find_elements
from gemma4_jax.data.sources.unpack import unpacked
from gemma4_jax.errors import InputError

MAX_RECORD_BYTES = 2**22
"""A longer record is refused before it is read."""

WHOLE_BYTES = 2**26
"""A larger file is known by its size and by `BLOCKS` evenly spaced blocks, the first and the last among them."""

BLOCKS, BLOCK_BYTES = 1024, 2**14

_PART_BYTES = 2**20
"""Of a line, in memory at one time while lines are looked for."""

_FORMS = {
    b"PK\x03\x04": "a ZIP archive: unpack it first",
    b"PAR1": "a Parquet file: give it the kind parquet",
    b"ARROW1": "an Arrow file: write its rows as JSON Lines",
    b"SQLite format 3": "an SQLite database: write its rows as JSON Lines",
    b"\xff\xfe": "text in UTF-16: save it in UTF-8",
    b"\xfe\xff": "text in UTF-16: save it in UTF-8",
    b"version https://git-lfs": "the pointer of a file in Git LFS: fetch the file itself with `git lfs pull`",
}
"""First bytes -> what the file is, and what to do with it."""


def find_records(path: Path) -> tuple[str, np.ndarray]:
    """Every record of a JSON Lines file but for blank lines, or every element of a file that is one JSON array.

    Args:
      path: of the file, which may be compressed, see `unpacked`.
    Returns:
      ("line" or "element", [n, 3] uint64: the fields of every `Record` in order).
    Raises:
      InputError: the file cannot be read, or is of neither form.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a file: give the path of one.")
        with unpacked(path).open("rb") as file:
            head = file.read(4096)
            if what := _other_form(head):
                raise InputError(f"{path} is not JSON Lines but {what}.")
            file.seek(0)
            if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                return "element", _compact(_find_elements(file, path))
            records = _compact(_find_lines(file))
            if len(records) > 1 and records[0, 2] <= MAX_RECORD_BYTES:
                _check_first(read_record(file, record_at(records, 0)), path)
            return "line", records
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _compact(records: Iterator[Record]) -> np.ndarray:
    """24 bytes a record, where tuples would take two hundred."""
    fields = array.array("Q")
    for record in records:
        fields.extend(record)
    return np.array(fields, np.uint64).reshape(-1, len(Record._fields))


def record_at(records: np.ndarray, index: int) -> Record:
    """One of the records that `find_records` found."""
    return Record(*records[index].tolist())


def read_record(file: BinaryIO, record: Record) -> bytes:
    """The bytes of a record.

    Raises:
      InputError: it is longer than `MAX_RECORD_BYTES`.
    """
    if record.length > MAX_RECORD_BYTES:
        raise InputError(f"a record of {record.length} bytes is refused: at most {MAX_RECORD_BYTES} are read.")
    file.seek(record.offset)
    return file.read(record.length)


def _other_form(head: bytes) -> str:
    for start, what in _FORMS.items():
        if head.startswith(start):
            return what
    return "binary, or text in UTF-16: give text in UTF-8" if b"\0" in head else ""


def _find_lines(file: BinaryIO) -> Iterator[Record]:
    number = offset = 0
    while part := file.readline(_PART_BYTES):
        number, length, is_blank = number + 1, len(part), part.isspace()
        while not part.endswith(b"\n") and (part := file.readline(_PART_BYTES)):
            length, is_blank = length + len(part), is_blank and part.isspace()
        if not is_blank:
            yield Record(number, offset, length)
        offset += length


def _check_first(line: bytes, path: Path) -> None:
    """Refuses a file whose first line is the beginning of an object."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        if error.pos >= len(error.doc.rstrip()) and error.doc.lstrip().startswith("{"):
            raise InputError(
                f"{path} is not JSON Lines, for the object of its first line goes on in the next: write "
                "each object in one line, or all of them as one array."
            ) from error
    except (ValueError, RecursionError):
        pass  # a bad line like any other


def _find_elements(file: BinaryIO, path: Path) -> Iterator[Record]:
    try:
        yield from find_elements(file)
    except ValueError as error:
        raise InputError(
            f"{path} begins like a JSON array and is none ({error}): write one object a line, or mend it."
        ) from error


def files_fingerprint(paths: Sequence[Path]) -> dict[str, Any]:
    """{"bytes": size of all, "blake2b": digest}, and of several {"files": their number}; see `file_fingerprint`."""
    if len(paths) == 1:
        return file_fingerprint(paths[0])
    known = [file_fingerprint(path, share=len(paths)) for path in paths]
    digest = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
    return {"files": len(paths), "bytes": sum(file["bytes"] for file in known), "blake2b": digest}


def file_fingerprint(path: Path, share: int = 1) -> dict[str, Any]:
    """{"bytes": size, "blake2b": digest of the file, or of some blocks of a large one}; at most 64 MB are read.

    Args:
      path: of the file.
      share: of several files each is read so many times less.
    Raises:
      InputError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            starts: Sequence[int] = range(0, size, BLOCK_BYTES)
            if size > max(WHOLE_BYTES // share, 2 * BLOCK_BYTES):
                blocks = max(BLOCKS // share, 2)
                starts = [i * (size - BLOCK_BYTES) // (blocks - 1) for i in range(blocks)]
            for start in starts:
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    return {"bytes": size, "blake2b": digest.hexdigest()}
