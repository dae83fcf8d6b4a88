"""Where files may be, what only stands for one, and writing those that are never seen half-written."""

import os
import re
import secrets
import zlib
from pathlib import Path

from gemma4_jax.errors import InputError

_PIECE_BYTES = 1 << 22

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path, content: bytes) -> None:
    """Refuses what a clone without git-lfs holds in place of a large file.

    Args:
      path: of the file.
      content: how it begins.
    Raises:
      InputError: it is a pointer.
    """
    if content.startswith(_LFS_POINTER):
        raise InputError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder.")


LOCAL = "a local path; mount a bucket, for example with gcsfuse or mountpoint-s3, and give its folder"
"""What is accepted where an address such as gs://bucket/run is not."""


def local_path(given: str | Path) -> Path:
    """A path that somebody wrote; `~` is the home of the user.

    Raises:
      InputError: it is the address of a remote place, or its `~` is nobody's home.
    """
    if is_remote(given):
        raise InputError(f"{str(given)!r} is not possible: it must be {LOCAL}.")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise InputError(f"{str(given)!r} begins with the home of a user who is not known here.") from error


def is_remote(given: str | Path) -> bool:
    """Whether this is an address such as gs://bucket/run, also after pathlib has made gs:/bucket/run of it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(given)) is not None


def write_atomically(path: Path, content: str | bytes, *, is_synced: bool = True) -> None:
    """Writes a file so that at any time there is the old one, or the new one, whole.

    Args:
      path: of the file.
      content: of the new one.
      is_synced: whether it is on the disk when this returns; else a machine that loses power may leave it damaged.
    Raises:
      OSError: it cannot be written; the old one, if there is one, stays.
    """
    # Not the process id: on machines that share a disk two may have the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if is_synced:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def checksum(path: Path) -> int:
    """The CRC-32 of a file, which is read in pieces.

    Raises:
      OSError: it cannot be read.
    """
    crc, piece = 0, memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(piece):
            crc = zlib.crc32(piece[:num_bytes], crc)
    return crc
