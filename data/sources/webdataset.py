"""WebDataset: tar files in which the files of a sample stand together and differ in what follows their first dot."""

import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma4_jax.data.sources import Source
from gemma4_jax.data.sources.files import MAX_FILE_BYTES, File, find_files, read_range
from gemma4_jax.data.sources.fingerprint import files_fingerprint
from gemma4_jax.data.sources.index import Column, ColumnWriter, once_found
from gemma4_jax.data.sources.records import MAX_RECORD_BYTES, parse_json
from gemma4_jax.data.sources.tar import find_members
from gemma4_jax.data.sources.unpack import unpacked
from gemma4_jax.errors import InputError

MAX_FILES, MAX_SAMPLE_FILES = 2**26, 1024
"""Of a source, and of a sample in it."""

MAX_SAMPLE_BYTES = 2**28
"""Of all files of a sample."""

IMAGES = {"jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff"}
SOUNDS = {"wav", "flac", "mp3", "ogg", "opus"}


class _Member(NamedTuple):
    """A file in a tar: how the sample calls it, where its bytes are."""

    field: str
    base: str
    offset: int
    size: int


class _Tars(NamedTuple):
    """What is known of tars, file after file.

    Attributes:
      readable: the tars themselves.
      stops: samples up to the end of each.
      starts: of each sample the number of its first file, and at last the number of files.
      names, name_stops: of all files, and where each ends.
      places: of each file where its bytes begin, and how many they are.
    """

    readable: list[File]
    stops: list[int]
    starts: Column
    names: Column
    name_stops: Column
    places: Column


@once_found
def _find_samples(paths: Sequence[File]) -> _Tars:
    readable = [unpacked(path) for path in paths]
    names, name_stops = ColumnWriter("names", np.uint8), ColumnWriter("name-stops")
    places, starts, stops = ColumnWriter("places"), ColumnWriter("samples"), []
    for path, tar in zip(paths, readable, strict=True):
        key, keys = None, array.array("q")
        for name, offset, size in find_members(tar, path):
            if len(name_stops) == MAX_FILES:
                raise InputError(f"{path} brings more than the {MAX_FILES} files that are read of a source.")
            if (now := _key_of(name)) != key:
                key = now
                keys.append(hash(now))
                starts.append(len(name_stops))
            places.append(offset, size)
            names.append(*name.encode("utf-8", "surrogateescape"))
            name_stops.append(len(names))
        _refuse_parted(tar, path, keys)
        stops.append(len(starts))
    starts.append(len(name_stops))
    return _Tars(readable, stops, starts.close(), names.close(), name_stops.close(), places.close())


class WebdatasetSource(Source):
    """The samples of tar files, in their order: an image as `image` (several as `images`), a sound as `audio`, txt as
    `text`, the keys of json as they are, and every other file as its bytes under what follows the first dot.

    A file that the json names stands where that names it. Nothing is unpacked: tars are searched once, and files read
    by their place.

    Args:
      path: of the tar files, see `find_files`. They may be compressed, see `unpacked`.
    Raises:
      InputError: a file cannot be read or is no tar, has too many files, or files of a sample apart from one another.
    """

    def __init__(self, path: str) -> None:
        self._paths = find_files(path)
        self._tars = _find_samples(self._paths)

    def __len__(self) -> int:
        return len(self._tars.starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        files = self._files(index)
        fields = [file.field for file in files]
        if twice := next((field for field in fields if fields.count(field) > 1), None):
            raise InputError(f"it has two files {twice!r:.100}.")
        size = sum(file.size for file in files)
        if size > MAX_SAMPLE_BYTES:
            raise InputError(f"a sample of {size} bytes is refused: at most {MAX_SAMPLE_BYTES} are read.")
        return _record(files, [self._read(index, file) for file in files])

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "webdataset", "documents": len(self), **files_fingerprint(self._paths)}

    def name(self, index: int) -> str:
        key = _key_of(self._name(int(self._tars.starts.numbers[index])))
        return f"{self._paths[self._tar(index)].name} sample {key}"

    def read_file(self, index: int, path: str, what: str) -> bytes:
        for file in self._files(index):
            if file.base == path.rpartition("/")[2]:
                return self._read(index, file)
        raise InputError(f"the {what} {path!r:.100} is not in its sample: put it there, under the key of that.")

    def _tar(self, index: int) -> int:
        return int(np.searchsorted(self._tars.stops, index, side="right"))

    def _name(self, number: int) -> str:
        start = int(self._tars.name_stops.numbers[number - 1]) if number else 0
        name = self._tars.names.numbers[start : int(self._tars.name_stops.numbers[number])]
        return name.tobytes().decode("utf-8", "surrogateescape")

    def _files(self, index: int) -> list[_Member]:
        start, stop = self._tars.starts.numbers[index : index + 2].tolist()
        if stop - start > MAX_SAMPLE_FILES:
            raise InputError(f"a sample of {stop - start} files is refused: at most {MAX_SAMPLE_FILES} are read.")
        files = []
        for number in range(start, stop):
            base = self._name(number).rpartition("/")[2]
            place = self._tars.places.numbers[2 * number : 2 * number + 2]
            files.append(_Member(base.partition(".")[2], base, *place.tolist()))
        return files

    def _read(self, index: int, file: _Member) -> bytes:
        if file.size > (limit := MAX_RECORD_BYTES if _kind_of(file) in ("json", "txt") else MAX_FILE_BYTES):
            raise InputError(f"{file.base!r:.100} has {file.size} bytes, and at most {limit} are read.")
        try:
            content = read_range(self._tars.readable[self._tar(index)], file.offset, file.offset + file.size)
        except OSError as error:
            raise InputError(f"the tar cannot be read: {error.strerror}.") from error
        if len(content) != file.size:
            raise InputError(f"{file.base!r:.100} is not whole: the tar ends in it.")
        return content


def _refuse_parted(readable: File, path: File, keys: array.array) -> None:
    """Refuses a tar with files of a sample apart, whose key so comes twice; keys are known by 64 bits."""
    hashes = np.frombuffer(keys, np.int64)
    hashes.sort()  # in its place: of millions, a copy is memory that nothing else takes
    if not (twice := set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())):
        return
    key, seen = None, set()
    for name, _, _ in find_members(readable, path):
        if (now := _key_of(name)) != key:
            if now in seen:
                raise InputError(f"{path} has files of the sample {now!r:.100} apart: sort it by name.")
            key = now
            if hash(now) in twice:
                seen.add(now)


def _key_of(name: str) -> str:
    """Of the sample that a file belongs to: its path up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _kind_of(file: _Member) -> str:
    return file.field.rpartition(".")[2].lower()


def _record(files: list[_Member], contents: list[bytes]) -> dict[str, Any]:
    """The columns of a sample."""
    said: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for file, content in zip(files, contents, strict=True):
        kind = _kind_of(file)
        try:
            if kind == "json":
                value = parse_json(content)
                said |= value if isinstance(value, dict) else {file.field: value}
            elif kind in ("txt", "cls"):
                others["text" if file.field == "txt" else file.field] = content.decode("utf-8")
            elif kind not in IMAGES | SOUNDS:
                others[file.field] = content
        except ValueError as error:  # bad UTF-8, and what is wrong with JSON
            raise InputError(f"{file.base!r:.100} cannot be read ({str(error).rstrip('.')}).") from error
    named = set(_named_files(said))
    for column, kinds in (("image", IMAGES), ("audio", SOUNDS)):
        beside = [
            {"bytes": content, "path": file.base}
            for file, content in zip(files, contents, strict=True)
            if _kind_of(file) in kinds and file.base not in named
        ]
        others |= {column: beside[0]} if len(beside) == 1 else {f"{column}s": beside} if beside else {}
    return said | others


def _named_files(value: Any) -> Iterator[str]:
    """The last part of every path in a JSON value."""
    if isinstance(value, str) and "://" not in value:
        yield value.rpartition("/")[2]
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _named_files(inner)
