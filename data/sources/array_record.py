"""ArrayRecord files: records by index, each a JSON object or a serialized tf.train.Example."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.data.sources import Source
from gemma4_jax.data.sources.files import MAX_FILE_BYTES, find_files, version_of
from gemma4_jax.data.sources.fingerprint import files_fingerprint
from gemma4_jax.data.sources.records import MAX_RECORD_BYTES, parse_json
from gemma4_jax.errors import InputError, reason_of

MAX_OPEN_FILES = 64
"""Of a process."""

_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
"""For random access: nothing is read ahead."""


class ArrayRecordSource(Source):
    """The records of ArrayRecord files, file by file.

    A record is a JSON object in UTF-8, or a tf.train.Example, whose features are columns: one value as it is, several
    as a list. Write them with `group_size:1`, or a random record costs the reading of its whole group.

    Args:
      path: of the files, see `find_files`; they must be on a disk.
    Raises:
      InputError: a file cannot be read, or array_record is not installed.
    """

    def __init__(self, path: str) -> None:
        files = find_files(path)
        self._paths = [file for file in files if isinstance(file, Path)]
        if len(self._paths) < len(files):
            raise InputError(f"ArrayRecord is read from a disk: mount the bucket of {path}, or copy its files.")
        for file in self._paths:
            if not file.is_file():
                raise InputError(f"{file} cannot be read: it is no file.")
        self._versions = [version_of(file) for file in self._paths]
        sizes = [self._reader(number).num_records() for number in range(len(self._paths))]
        self._stops = np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, place = self._locate(index)
        try:
            # A range, not a list: the time of `read([place])` grows with the records of the file.
            (record,) = self._reader(number).read(place, place + 1)
        except Exception as error:  # the library raises exceptions of several kinds
            raise InputError(f"it cannot be read ({reason_of(error)}).") from error
        is_json = record[:256].lstrip()[:1] == b"{"
        if len(record) > (limit := MAX_RECORD_BYTES if is_json else MAX_FILE_BYTES):
            raise InputError(f"a record of {len(record)} bytes is refused: at most {limit} are read.")
        return parse_json(record) if is_json else _parse_example(record)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "arrayrecord", "documents": len(self), **files_fingerprint(self._paths)}

    def name(self, index: int) -> str:
        number, place = self._locate(index)
        return f"{self._paths[number].name} record {place + 1}"

    def _reader(self, number: int) -> Any:
        return _open(self._paths[number], self._versions[number])

    def _locate(self, index: int) -> tuple[int, int]:
        """(number of its file, its place in that)."""
        number = int(np.searchsorted(self._stops, index, side="right"))
        return number, index - (int(self._stops[number - 1]) if number else 0)


@functools.lru_cache(MAX_OPEN_FILES)
def _open(path: Path, version: tuple[int, int]) -> Any:
    """The version of the file is there for the cache, which otherwise would not see it change."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader  # no wheels for Windows
    except ImportError as error:
        raise InputError("ArrayRecord needs array_record: install it.") from error
    try:
        reader = ArrayRecordReader(str(path), _OPTIONS)
        if not reader.ok():  # which then has no records
            raise ValueError("it is damaged, was not closed by its writer, or is another format")
    except Exception as error:  # the library raises exceptions of several kinds
        raise InputError(f"{path} cannot be read as ArrayRecord ({reason_of(error)}).") from error
    return reader


def _parse_example(record: bytes) -> dict[str, Any]:
    """The features of a tf.train.Example, by name."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # heavy, and other records do without

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise InputError("a record must be a JSON object or a tf.train.Example, and is neither.") from error
    if not features:
        raise InputError("a record must be a JSON object or a tf.train.Example with features, and is neither.")
    values = {name: list(getattr(f, kind).value) for name, f in features.items() if (kind := f.WhichOneof("kind"))}
    return {name: value[0] if len(value) == 1 else value for name, value in values.items()}
