"""What the towers read of files, on disk by the content that it was made of: for later epochs, and other runs.

An entry is a file with an array and its checksum, written beside its place and renamed. So any number of processes, on
any number of machines, may share a folder, and its user may delete it at any time. Nothing else is deleted.
"""

import functools
import hashlib
import importlib.metadata
import logging
import math
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.data.sources.unpack import MIN_FREE_BYTES
from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path, write_atomically
from gemma4_jax.run_config import DataConfig

FORMAT = 1
"""Of an entry; a change of it, or of what the package makes of a file by its own rules, counts it up."""

_CHECKSUM_BYTES = 4
_PAGE_BYTES, _PIECE_BYTES = 2**12, 2**18


class Cache:
    """Arrays by what they were made of.

    Args:
      folder: that is there.
      max_bytes: of it; with so many, nothing is added.
      num_writers: processes of a run, each of which adds its share of what is left.
    """

    def __init__(self, folder: Path, max_bytes: int, num_writers: int = 1) -> None:
        self._folder, self._max_bytes, self._num_writers = folder, max_bytes, num_writers
        self._left = 0
        self._lock = threading.Lock()
        self._is_writing = True
        self._is_warning = True

    def __reduce__(self) -> Any:
        return Cache, (self._folder, self._max_bytes, self._num_writers)  # in another process with counts of its own

    def get(
        self,
        content: bytes,
        make: Callable[[], np.ndarray],
        shape: tuple[int, ...],
        dtype: Any,
        *,
        settings: tuple[Any, ...],
        libraries: tuple[str, ...],
    ) -> np.ndarray:
        """The array that `make` makes of a file: from the folder where it is there, whole; else made, and added.

        Args:
          content: of the file.
          make: called where there is no entry, or a damaged one; what it raises is raised.
          shape, dtype: of the array.
          settings: what decides of the array beside the content, with a repr that says all of it.
          libraries: that make it, and may make another in another version.
        """
        made_by = FORMAT, settings, tuple(map(_version, libraries)), shape, np.dtype(dtype).str
        digest = hashlib.sha256(repr(made_by).encode())
        digest.update(content)
        key = digest.hexdigest()
        path = self._folder / key[:2] / key[2:]
        array = self._read(path, shape, np.dtype(dtype))
        if array is None:
            array = make()
            self._write(path, array)
        return array

    def _read(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
        """The array of an entry; None if there is none, or none that is whole."""
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size == math.prod(shape) * dtype.itemsize + _CHECKSUM_BYTES:
                    array = np.empty(shape, dtype)
                    if _checksum(array, path.name, file) == file.read(_CHECKSUM_BYTES):
                        return array
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"{path} cannot be read ({error.strerror}): what it holds is made again.")
            return None
        self._warn(f"{path} is damaged: what it holds is made again, as of all others that are.")
        return None

    def _write(self, path: Path, array: np.ndarray) -> None:
        """Adds an entry, as long as there is room and nothing has gone wrong."""
        if not self._is_writing:
            return
        try:
            reason = self._lack_of_room(array.nbytes + _CHECKSUM_BYTES)
            if not reason:
                path.parent.mkdir(exist_ok=True)
                # What a machine that loses power leaves half-written has another checksum.
                write_atomically(path, array.tobytes() + _checksum(array, path.name), is_synced=False)
        except OSError as error:
            reason = error.strerror or str(error)
        if reason and self._is_writing:
            self._is_writing = False
            logging.warning("data.cache_dir: nothing is added to %s any more: %s.", self._folder, reason)

    def _lack_of_room(self, num_bytes: int) -> str:
        """Why an entry of so many bytes may not be added; empty if it may."""
        if shutil.disk_usage(self._folder).free < MIN_FREE_BYTES + num_bytes:
            return f"less than {MIN_FREE_BYTES} bytes of its disk are free"
        with self._lock:
            if self._left < num_bytes:  # others write too: each looks again once it has written its share
                self._left = (self._max_bytes - _bytes_in(self._folder)) // self._num_writers
            self._left -= num_bytes
            return f"it has data.cache_bytes={self._max_bytes}" if self._left < 0 else ""

    def _warn(self, sentence: str) -> None:
        """Once for all entries."""
        if self._is_warning:
            self._is_warning = False
            logging.warning("data.cache_dir: %s", sentence)


def open_cache(data: DataConfig, num_writers: int) -> Cache | None:
    """The cache that a config names, None if it names none.

    Raises:
      InputError: its folder is not there, and cannot be made.
    """
    if not data.cache_dir:
        return None
    folder = local_path(data.cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"data.cache_dir={data.cache_dir!r} cannot be a folder: {error.strerror}.") from error
    return Cache(folder, data.cache_bytes, num_writers)


def _checksum(array: np.ndarray, name: str, file: RawIOBase | None = None) -> bytes:
    """Of an array in an entry of this name: the CRC-32 of the sums of its pages, which take a tenth of the time.

    Args:
      array: contiguous.
      name: of the entry.
      file: that the array is first read from, piece by piece, so that a piece is still in the processor's cache.
    """
    content, crc = array.reshape(-1).view(np.uint8), zlib.crc32(name.encode())
    for start in range(0, len(content), _PIECE_BYTES):
        piece = content[start : start + _PIECE_BYTES]
        if file is not None:
            file.readinto(piece.data)
        pages = piece[: len(piece) // _PAGE_BYTES * _PAGE_BYTES].view("<u8").reshape(-1, _PAGE_BYTES // 8)
        crc = zlib.crc32(piece[pages.nbytes :].data, zlib.crc32(pages.sum(axis=1).data, crc))
    return crc.to_bytes(_CHECKSUM_BYTES, "little")


def _bytes_in(folder: Path) -> int:
    """Of all files in the folders of a folder."""
    total = 0
    for part in filter(os.DirEntry.is_dir, os.scandir(folder)):
        for entry in os.scandir(part):
            try:
                total += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:  # it has been renamed
                continue
    return total


@functools.cache
def _version(library: str) -> str:
    return importlib.metadata.version(library)
