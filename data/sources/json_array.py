"""Where the elements of a JSON array lie in its file, however large that is."""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

PART_BYTES = 2**20
"""Of the file, in memory at one time."""

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_BETWEEN = re.compile(rb'%b|["\[\]{},]' % _STRING, re.DOTALL)
"""Between elements: a string that ends in this part, the beginning of another, or a mark."""

_WITHIN = re.compile(rb'(?:[^"\[\]{}]++|%b)*+(["\[\]{}])' % _STRING, re.DOTALL)
"""Within an element: all up to its next bracket, or to the beginning of a string that does not end in this part."""

_IN_STRING = re.compile(rb'["\\]')
_BLANK_BYTES = 4096


class Record(NamedTuple):
    """A record in a file: the number of its line or element, from 1, and its bytes offset..offset+length-1."""

    number: int
    offset: int
    length: int


def find_elements(file: BinaryIO) -> Iterator[Record]:
    """The elements of the array that a file holds, with the space around them.

    Only brackets, strings and the commas between elements are looked at: what is wrong inside of an element is for who
    reads that.

    Raises:
      ValueError: the file is no array.
    """
    number = start = 0
    has_value, stop = False, -1
    for mark, place, depth in _marks(file):
        if stop >= 0:
            break
        if mark in b'"[{':
            if depth + (mark == b'"') == 2 and has_value:
                raise ValueError(f"no comma before byte {place}")
            has_value |= start > 0
            start = start or place + 1
            continue
        if depth == 0 or (depth == 1 and mark == b","):
            is_last_of_none = depth == 0 and number == 0
            if has_value or not _is_blank(file, start, place - start):
                number += 1
                yield Record(number, start, place - start)
            elif not is_last_of_none:
                raise ValueError(f"nothing before byte {place}")
            start, has_value = place + 1, False
            if depth == 0:
                stop = place + 1
                if mark != b"]":
                    raise ValueError(f"it is closed by {mark.decode()!r} at byte {place}")
    if stop < 0:
        raise ValueError("it does not end")
    file.seek(stop)
    while part := file.read(PART_BYTES):
        if part.strip():
            raise ValueError("Extra data after the array")


def _marks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(mark, place, depth behind it) of brackets, and of the commas and the beginnings of strings between elements."""
    offset = place = depth = 0
    is_text = False
    while part := file.read(PART_BYTES):
        while found := _next_mark(part, place, depth, is_text=is_text):
            mark, begin, place = found
            if mark == b"\\":  # it takes what follows it, perhaps in the next part
                place += 1
            elif mark == b'"' and (is_text or depth > 1):
                is_text = not is_text
            else:
                is_text = mark == b'"' and place - begin == 1
                depth += (mark in b"[{") - (mark in b"]}")
                yield mark, offset + begin, depth
        offset += len(part)
        place = max(0, place - len(part))


def _next_mark(part: bytes, place: int, depth: int, *, is_text: bool) -> tuple[bytes, int, int] | None:
    """(mark, where it begins, where to go on)."""
    if depth > 1 and not is_text:
        found = _WITHIN.match(part, place)
        return found and (found[1], found.start(1), found.end())
    found = (_IN_STRING if is_text else _BETWEEN).search(part, place)
    return found and (found[0][:1], found.start(), found.end())


def _is_blank(file: BinaryIO, start: int, length: int) -> bool:
    place = file.tell()
    file.seek(start)
    content = file.read(min(length, _BLANK_BYTES))
    file.seek(place)
    return not content.strip()
