"""Where the records of a JSON file lie: one a line, or the elements of one array. Files in other forms are refused."""

import array
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gemma4_jax.errors import InputError

MAX_RECORD_BYTES = 2**22
"""A longer record is refused before it is read."""

MAX_ARRAY_BYTES = 2**27
"""An array is read whole to find its elements: a larger one must be given one object a line."""

WHOLE_BYTES = 2**26
"""A larger file is known by its size and by `BLOCKS` evenly spaced blocks, the first and the last among them."""

BLOCKS, BLOCK_BYTES = 1024, 2**14

_PART_BYTES = 2**20
"""Of a line, in memory at one time while lines are looked for."""

_SPACE = re.compile(r"[ \t\n\r]*")

_FORMS = {
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"PK\x03\x04": "a ZIP archive: unpack it first",
    b"PAR1": "a Parquet file: write its rows as JSON Lines",
    b"ARROW1": "an Arrow file: write its rows as JSON Lines",
    b"SQLite format 3": "an SQLite database: write its rows as JSON Lines",
    b"\xff\xfe": "text in UTF-16: save it in UTF-8",
    b"\xfe\xff": "text in UTF-16: save it in UTF-8",
    b"version https://git-lfs": "the pointer of a file in Git LFS: fetch the file itself with `git lfs pull`",
}
"""First bytes -> what the file is, and what to do with it."""


class Record(NamedTuple):
    """A record in a file: the number of its line or element, from 1, and its bytes offset..offset+length-1."""

    number: int
    offset: int
    length: int


def find_records(path: Path) -> tuple[str, np.ndarray]:
    """Every record of a JSON Lines file but for blank lines, or every element of a file that is one JSON array.

    Args:
      path: of the file.
    Returns:
      ("line" or "element", [n, 3] uint64: the fields of every `Record` in order).
    Raises:
      InputError: the file cannot be read, or is of neither form.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a file: give the path of one.")
        with path.open("rb") as file:
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
    size = os.fstat(file.fileno()).st_size
    if size > MAX_ARRAY_BYTES:
        raise InputError(
            f"{path} is a JSON array of {size} bytes, and at most {MAX_ARRAY_BYTES} of an array "
            "are read: write it as JSON Lines, one object a line."
        )
    try:
        text = file.read().decode("utf-8")
        decode = json.JSONDecoder().raw_decode
        start = _skip_space(text, text.index("[") + 1)
        offset, number, mark = len(text[:start].encode()), 0, text[start : start + 1]
        while mark != "]":
            _, stop = decode(text, start)
            number, length = number + 1, len(text[start:stop].encode())
            yield Record(number, offset, length)
            comma = _skip_space(text, stop)
            mark = text[comma : comma + 1]
            if mark not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, comma)
            following = _skip_space(text, comma + 1)
            offset += length + len(text[stop:following].encode())
            start = following
        if text[start + (number == 0) :].strip():
            raise json.JSONDecodeError("Extra data after the array", text, start)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} begins like a JSON array and is none ({error}): write one object a line, or mend it."
        ) from error


def _skip_space(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    return space.end() if space else start


def file_fingerprint(path: Path) -> dict[str, Any]:
    """{"bytes": size, "blake2b": digest of the file, or of some blocks of a large one}; at most 64 MB are read.

    Raises:
      InputError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            starts: Sequence[int] = range(0, size, BLOCK_BYTES)
            if size > WHOLE_BYTES:
                starts = [i * (size - BLOCK_BYTES) // (BLOCKS - 1) for i in range(BLOCKS)]
            for start in starts:
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    return {"bytes": size, "blake2b": digest.hexdigest()}
