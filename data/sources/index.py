"""Numbers of every record, such as where it begins, in a mapped file: millions of them cost no memory."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gemma4_jax.data.sources.files import File, version_of
from gemma4_jax.data.sources.scratch import scratch_file
from gemma4_jax.errors import InputError

T = TypeVar("T")

_PART = 2**13
"""Numbers in memory while a column is written."""


def once_found(find: Callable[[Sequence[File]], T]) -> Callable[[Sequence[File]], T]:
    """A function of files as one that looks into them once in a process, as long as they stay what they are."""
    found = functools.cache(lambda paths, versions: find(paths))

    @functools.wraps(find)
    def call(paths: Sequence[File]) -> T:
        versions = []
        for path in paths:
            try:
                versions.append(version_of(path))
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}.") from error
        return found(tuple(paths), tuple(versions))

    return call


class Column:
    """A column of numbers in a temporary file. Worker processes map the same one: it is pickled as its path.

    Args:
      path: of the file.
      dtype: of the numbers.
    """

    def __init__(self, path: Path, dtype: Any) -> None:
        self._path, self._dtype = path, np.dtype(dtype)

    def __getstate__(self) -> tuple[Path, Any]:
        return self._path, self._dtype

    def __setstate__(self, state: tuple[Path, Any]) -> None:
        self._path, self._dtype = state

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """[n], mapped."""
        if not self._path.stat().st_size:  # which cannot be mapped
            return np.zeros(0, self._dtype)
        return np.memmap(self._path, self._dtype, mode="r").view(np.ndarray)

    def __len__(self) -> int:
        return len(self.numbers)


class ColumnWriter:
    """Writes a `Column`, a few numbers at a time.

    Args:
      name: what is in it.
      dtype: of the numbers.
    """

    def __init__(self, name: str, dtype: Any = np.uint64) -> None:
        self._path, self._dtype = scratch_file(name), np.dtype(dtype)
        self._file = self._path.open("wb")
        self._waiting: list[int] = []
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def append(self, *numbers: int) -> None:
        """Adds a few numbers."""
        self._waiting += numbers
        if len(self._waiting) >= _PART:
            self._flush()

    def extend(self, numbers: np.ndarray) -> None:
        """Adds many numbers."""
        self._flush()
        self._write(numbers.astype(self._dtype, copy=False))

    def close(self) -> Column:
        """What was written."""
        self._flush()
        self._file.close()
        return Column(self._path, self._dtype)

    def _flush(self) -> None:
        self._write(np.array(self._waiting, self._dtype))
        self._waiting.clear()

    def _write(self, numbers: np.ndarray) -> None:
        try:
            self._file.write(numbers.tobytes())
        except OSError as error:
            raise InputError(f"{self._path.parent} cannot be written ({error.strerror}): set TMPDIR.") from error
        self._written += len(numbers)
