"""Compressed files, unpacked once into temporary ones: in a compressed file no record can be found by its place."""

import bz2
import contextlib
import functools
import gzip
import importlib
import lzma
import shutil
from collections.abc import Callable
from typing import Any, BinaryIO

from gemma4_jax.data.sources.files import File, version_of
from gemma4_jax.data.sources.scratch import scratch_file
from gemma4_jax.errors import InputError

MAX_UNPACKED_BYTES = 2**34
"""Of one file: what unpacks to more is refused."""

MIN_FREE_BYTES = 2**30
"""That stay free where temporary files are."""

_PART_BYTES = 2**20


def _zstd(file: BinaryIO) -> Any:
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).open(file, "rb")
    raise InputError("it is compressed by zstd: install zstandard, as `gemma4-jax[zstd]` does, or unpack it.")


_FORMS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""First bytes -> what opens such a file."""


def unpacked(path: File) -> File:
    """The file itself, or, where it is compressed by gzip, bzip2, xz or zstd, a temporary one with what is in it.

    Temporary files are where TMPDIR says, are shared by all who ask in this process, and are gone when it ends.

    Raises:
      InputError: the file cannot be read, is damaged, or unpacks to more than `MAX_UNPACKED_BYTES` or the disk has.
    """
    try:
        if not path.is_file():
            return path  # its reader says what it is
        with path.open("rb") as file:
            head = file.read(8)
        for start, opener in _FORMS.items():
            if head.startswith(start):
                return _unpack(path, opener, version_of(path))
        return path
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


@functools.cache
def _unpack(path: File, opener: Callable[[BinaryIO], Any], version: tuple[int, int]) -> File:
    """The version of the file is there for the cache, which otherwise would not see it change."""
    target = scratch_file(path.name)
    try:
        with target.open("wb") as out, path.open("rb") as packed, opener(packed) as file:
            total = 0
            while part := file.read(_PART_BYTES):
                total += len(part)
                if total > MAX_UNPACKED_BYTES:
                    raise InputError(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes: unpack it yourself.")
                if shutil.disk_usage(target.parent).free < MIN_FREE_BYTES:
                    raise InputError(f"it cannot be unpacked, for {target.parent} is full: set TMPDIR, or unpack it.")
                out.write(part)
        return target
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, InputError):
            raise InputError(f"{path}: {error}") from error
        if not isinstance(error, Exception):
            raise
        # a damaged file ends in exceptions of every kind, which are of the library that meets it
        raise InputError(f"{path} cannot be unpacked ({error or type(error).__name__}): it is damaged.") from error
