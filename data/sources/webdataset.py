"""WebDataset: tar files in which the files of a sample stand together and differ in what follows their first dot."""

import array
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gemma4_jax.data.sources import Source
from gemma4_jax.data.sources.files import MAX_FILE_BYTES, find_files
from gemma4_jax.data.sources.records import MAX_RECORD_BYTES, files_fingerprint
from gemma4_jax.data.sources.unpack import unpacked
from gemma4_jax.errors import InputError

MAX_FILES, MAX_SAMPLE_FILES = 2**24, 1024
"""Of a source, and of a sample in it."""

MAX_SAMPLE_BYTES = 2**28
"""Of all files of a sample."""

MAX_HEADER_BYTES = 2**16
"""Of what stands before a file in a tar: a longer name is refused before it is read."""

IMAGES = {"jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff"}
SOUNDS = {"wav", "flac", "mp3", "ogg"}


class _File(NamedTuple):
    """A file in a tar: how the sample calls it, where its bytes are."""

    field: str
    base: str
    offset: int
    size: int


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
        self._readable = [unpacked(file) for file in self._paths]
        places, name_stops, starts = array.array("Q"), array.array("Q"), array.array("Q")
        names, self._stops = bytearray(), []
        for file, readable in zip(self._paths, self._readable, strict=True):
            key, seen = None, set()
            for name, offset, size in _files_in(readable, file):
                if len(name_stops) == MAX_FILES:
                    raise InputError(f"{file} brings more than the {MAX_FILES} files that are read of a source.")
                if (now := _key_of(name)) != key:
                    if now in seen:
                        raise InputError(f"{file} has files of the sample {now!r:.100} apart: sort it by name.")
                    key = now
                    seen.add(now)
                    starts.append(len(name_stops))
                places.extend((offset, size))
                names += name.encode("utf-8", "surrogateescape")
                name_stops.append(len(names))
            self._stops.append(len(starts))
        self._names = bytes(names)
        self._name_stops = np.array(name_stops, np.uint64)
        self._places = np.array(places, np.uint64).reshape(-1, 2)
        self._starts = np.array([*starts, len(name_stops)], np.uint64)

    def __len__(self) -> int:
        return len(self._starts) - 1

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
        key = _key_of(self._name(int(self._starts[index])))
        return f"{self._paths[self._tar(index)].name} sample {key}"

    def read_file(self, index: int, path: str, what: str) -> bytes:
        for file in self._files(index):
            if file.base == path.rpartition("/")[2]:
                return self._read(index, file)
        raise InputError(f"the {what} {path!r:.100} is not in its sample: put it there, under the key of that.")

    def _tar(self, index: int) -> int:
        return int(np.searchsorted(self._stops, index, side="right"))

    def _name(self, number: int) -> str:
        start = int(self._name_stops[number - 1]) if number else 0
        return self._names[start : int(self._name_stops[number])].decode("utf-8", "surrogateescape")

    def _files(self, index: int) -> list[_File]:
        start, stop = self._starts[index : index + 2].tolist()
        if stop - start > MAX_SAMPLE_FILES:
            raise InputError(f"a sample of {stop - start} files is refused: at most {MAX_SAMPLE_FILES} are read.")
        files = []
        for number in range(start, stop):
            base = self._name(number).rpartition("/")[2]
            files.append(_File(base.partition(".")[2], base, *self._places[number].tolist()))
        return files

    def _read(self, index: int, file: _File) -> bytes:
        if file.size > (limit := MAX_RECORD_BYTES if _kind_of(file) in ("json", "txt") else MAX_FILE_BYTES):
            raise InputError(f"{file.base!r:.100} has {file.size} bytes, and at most {limit} are read.")
        try:
            with self._readable[self._tar(index)].open("rb") as tar:
                tar.seek(file.offset)
                content = tar.read(file.size)
        except OSError as error:
            raise InputError(f"the tar cannot be read: {error.strerror}.") from error
        if len(content) != file.size:
            raise InputError(f"{file.base!r:.100} is not whole: the tar ends in it.")
        return content


def _key_of(name: str) -> str:
    """Of the sample that a file belongs to: its path up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _kind_of(file: _File) -> str:
    return file.field.rpartition(".")[2].lower()


def _record(files: list[_File], contents: list[bytes]) -> dict[str, Any]:
    """The columns of a sample."""
    said: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for file, content in zip(files, contents, strict=True):
        kind = _kind_of(file)
        try:
            if kind == "json":
                value = json.loads(content)
                said |= value if isinstance(value, dict) else {file.field: value}
            elif kind in ("txt", "cls"):
                others["text" if file.field == "txt" else file.field] = content.decode("utf-8")
            elif kind not in IMAGES | SOUNDS:
                others[file.field] = content
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, and endless nesting
            raise InputError(f"{file.base!r:.100} cannot be read ({error}).") from error
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


class _Headers:
    """A file of which only small parts are read, for a tar says of itself how long its headers are."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _files_in(readable: Path, path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of its bytes, their number) of every plain file in a tar; hidden ones are left out."""
    try:
        with readable.open("rb") as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                tar.members = []  # which it keeps, and which would be all
                if member.isreg() and not member.issparse() and not member.name.rpartition("/")[2].startswith("."):
                    yield member.name, member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # which the library takes for the end
                raise tarfile.ReadError(f"bad header at {tar.offset}")
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as a tar file ({error}): it is damaged, or another format.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
