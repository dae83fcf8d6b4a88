"""Where the records of JSON files lie: one a line, or the elements of one array. Files in other forms are refused."""

import json
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from gemma4_jax.data.sources.files import File, read_range
from gemma4_jax.data.sources.index import ColumnWriter, once_found
from gemma4_jax.data.sources.json_array import find_elements
from gemma4_jax.data.sources.unpack import unpacked
from gemma4_jax.errors import InputError, reason_of

MAX_RECORD_BYTES = 2**22
"""A longer record is refused before it is read."""

MAX_NESTING = 64
"""Lists and objects of a record, one in another."""

_PART_BYTES = 2**20
"""Of a file, in memory at one time while lines are looked for."""

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


class Records:
    """The records of JSON files, file after file: every line that is not blank, or every element of an array.

    What is known of them is 8 bytes a record in a mapped file, and as many of each blank line.

    Args:
      paths: of the files, which may be compressed, see `unpacked`.
    Raises:
      InputError: a file cannot be read, or is of neither form.
    """

    def __init__(self, paths: Sequence[File]) -> None:
        self._paths = paths
        self._readable = [unpacked(path) for path in paths]
        starts, blanks = ColumnWriter("starts"), ColumnWriter("blanks")
        self._is_array, stops, blank_stops = [], [0], [0]
        for number, (path, readable) in enumerate(zip(paths, self._readable, strict=True)):
            self._is_array.append(_find(path, readable, starts, blanks))
            stops.append(len(starts) - number - 1)  # each file has one more, where its last record ends
            blank_stops.append(len(blanks))
        self._starts, self._blanks = starts.close(), blanks.close()
        self._stops, self._blank_stops = np.array(stops), np.array(blank_stops)
        for number in range(len(paths)):
            self._check_first(number)

    def __len__(self) -> int:
        return int(self._stops[-1])

    def file_of(self, index: int) -> int:
        """The number of the file that holds a record."""
        return int(np.searchsorted(self._stops, index, side="right")) - 1

    def name(self, index: int) -> str:
        """A record by its file and its place in that, from 1."""
        number = self.file_of(index)
        place = index - int(self._stops[number])
        if self._is_array[number]:
            return f"{self._paths[number].name} element {place + 1}"
        begin, end = self._blank_stops[number : number + 2]
        blanks = np.searchsorted(self._blanks.numbers[begin:end], place, side="right")
        return f"{self._paths[number].name} line {place + 1 + int(blanks)}"

    def read(self, index: int) -> bytes:
        """The bytes of a record.

        Raises:
          InputError: it is longer than `MAX_RECORD_BYTES`, or its file cannot be read.
        """
        number = self.file_of(index)
        start, stop = self._starts.numbers[index + number : index + number + 2].tolist()
        stop -= self._is_array[number]  # a comma, or the end of the array
        try:
            content = read_range(self._readable[number], start, min(stop, start + MAX_RECORD_BYTES + 1))
        except OSError as error:
            raise InputError(f"the file cannot be read: {error.strerror}.") from error
        if not self._is_array[number]:
            content = content.partition(b"\n")[0]  # blank lines may follow
        if len(content) > MAX_RECORD_BYTES:
            raise InputError(f"a record of {stop - start} bytes is refused: at most {MAX_RECORD_BYTES} are read.")
        return content

    def _check_first(self, number: int) -> None:
        """Refuses a file whose first line is the beginning of an object."""
        first, stop = self._stops[number : number + 2].tolist()
        if self._is_array[number] or stop - first < 2:
            return
        try:
            json.loads(self.read(first))
        except json.JSONDecodeError as error:
            if error.pos >= len(error.doc.rstrip()) and error.doc.lstrip().startswith("{"):
                raise InputError(
                    f"{self._paths[number]} is not JSON Lines, for the object of its first line goes on in the next: "
                    "write each object in one line, or all of them as one array."
                ) from error
        except (InputError, ValueError, RecursionError):
            pass  # a bad line like any other


find_records = once_found(Records)
"""The records of files; see `Records`."""


def parse_json(content: bytes) -> Any:
    """The value of a record.

    Raises:
      InputError: it is no JSON in UTF-8, or nested too deeply.
    """
    if content.count(b"[") + content.count(b"{") > MAX_NESTING:
        code = np.frombuffer(content, np.uint8)
        if b'"' in content:
            code = code[~_is_in_string(code)]
        steps = np.isin(code, np.frombuffer(b"[{", np.uint8)).astype(np.int64)
        steps -= np.isin(code, np.frombuffer(b"]}", np.uint8))
        if np.cumsum(steps).max(initial=0) > MAX_NESTING:
            raise InputError(f"its JSON is nested too deeply: at most {MAX_NESTING} lists and objects are.")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of too many digits
        raise InputError(f"it is not JSON ({reason_of(error)}).") from error


def _is_in_string(code: np.ndarray) -> np.ndarray:
    """[n] bool, whether a byte of JSON is inside of a text."""
    backslash = code == ord("\\")
    # A quote is escaped by an odd number of backslashes before it: where each run of them begins tells how many.
    places = np.arange(len(code))
    last_other = np.maximum.accumulate(np.where(backslash, -1, places))
    before = np.r_[0, (places - last_other)[:-1]]
    quotes = (code == ord('"')) & (before % 2 == 0)
    return np.cumsum(quotes) % 2 == 1


def _find(path: File, readable: File, starts: ColumnWriter, blanks: ColumnWriter) -> bool:
    """Writes where each record of a file begins, and where the last one ends; whether the file is an array."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a file: give the path of one.")
        with readable.open("rb") as file:
            head = file.read(4096)
            if what := _other_form(head):
                raise InputError(f"{path} is not JSON Lines but {what}.")
            file.seek(0)
            if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                _find_elements(file, path, starts)
                return True
            _find_lines(file, starts, blanks)
            return False
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _other_form(head: bytes) -> str:
    for start, what in _FORMS.items():
        if head.startswith(start):
            return what
    return "binary, or text in UTF-16: give text in UTF-8" if b"\0" in head else ""


_SPACE = np.zeros(256, bool)
_SPACE[list(b" \t\n\r\v\f")] = True


def _find_lines(file: BinaryIO, starts: ColumnWriter, blanks: ColumnWriter) -> None:
    """Of each blank line, writes how many records of the file are before it."""
    offset = begin = count = 0  # of this part; of the line that is open; records before that
    is_blank = True  # so far, of the line that is open
    while part := file.read(_PART_BYTES):
        code = np.frombuffer(part, np.uint8)
        ends = np.flatnonzero(code == ord("\n")) + 1
        if not len(ends):
            is_blank = is_blank and part.isspace()
            offset += len(part)
            continue
        begins = np.r_[0, ends[:-1]]
        # Few lines begin with a space, and only of these is more than the first byte looked at.
        blank = _SPACE[code[begins]]
        for i in np.flatnonzero(blank):
            blank[i] = part[begins[i] : ends[i]].isspace()
        blank[0] = is_blank and part[: ends[0]].isspace()
        absolute = begins + offset
        absolute[0] = begin
        starts.extend(absolute[~blank])
        blanks.extend(count + np.cumsum(~blank)[blank])
        count += int(np.sum(~blank))
        begin = offset + int(ends[-1])
        rest = part[ends[-1] :]
        is_blank = not rest or rest.isspace()
        offset += len(part)
    if not is_blank:
        starts.append(begin)
    starts.append(offset)


def _find_elements(file: BinaryIO, path: File, starts: ColumnWriter) -> None:
    stop = 0
    try:
        for _, offset, length in find_elements(file):
            starts.append(offset)
            stop = offset + length + 1
    except ValueError as error:
        raise InputError(
            f"{path} begins like a JSON array and is none ({error}): write one object a line, or mend it."
        ) from error
    starts.append(stop)
