"""What files are known by, wherever they lie."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from gemma4_jax.data.sources.files import File, size_of
from gemma4_jax.data.sources.remote import RemotePath
from gemma4_jax.errors import InputError

WHOLE_BYTES = 2**26
"""A larger file is known by its size and by `BLOCKS` evenly spaced blocks, the first and the last among them."""

BLOCKS, BLOCK_BYTES = 1024, 2**14


def files_fingerprint(paths: Sequence[File]) -> dict[str, Any]:
    """{"bytes": size of all, "blake2b": digest}, and of several {"files": their number}; see `file_fingerprint`."""
    if len(paths) == 1:
        return file_fingerprint(paths[0])
    known = [file_fingerprint(path, share=len(paths)) for path in paths]
    digest = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
    return {"files": len(paths), "bytes": sum(file["bytes"] for file in known), "blake2b": digest}


def file_fingerprint(path: File, share: int = 1) -> dict[str, Any]:
    """{"bytes": size, "blake2b": digest of the file, or of some blocks of a large one}; at most 64 MB are read.

    Args:
      path: of the file.
      share: of several files each is read so many times less.
    Raises:
      InputError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        size = size_of(path)
        if size > max(WHOLE_BYTES // share, 2 * BLOCK_BYTES):
            blocks = max(BLOCKS // share, 2)
            parts = _blocks(path, [i * (size - BLOCK_BYTES) // (blocks - 1) for i in range(blocks)])
        else:
            parts = _parts(path)
        for part in parts:
            digest.update(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _blocks(path: File, starts: Sequence[int]) -> Iterable[bytes]:
    if isinstance(path, RemotePath):
        yield from path.read_each(starts, BLOCK_BYTES)
        return
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            yield file.read(BLOCK_BYTES)


def _parts(path: File) -> Iterable[bytes]:
    with path.open("rb") as file:
        while part := file.read(2**20):
            yield part
