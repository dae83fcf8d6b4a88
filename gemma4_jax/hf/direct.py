"""Writing large files past the disk cache, which they would only fill with what nobody reads again."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_BUFFER_BYTES = 1 << 24
_DIRECT: int = getattr(os, "O_DIRECT", 0)


def write_through(path: Path, parts: Iterable[memoryview]) -> None:
    """Writes a new file; it is on the disk when this returns.

    Parts are gathered in one of two buffers while the other one is written, so that making and writing overlap.

    Args:
      path: must not exist.
      parts: the content, one after another, as views of bytes; none is kept.
    Raises:
      OSError: it cannot be written.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _set_direct(file, True)
        with ThreadPoolExecutor(max_workers=1) as pool:
            buffer, other = (mmap.mmap(-1, _BUFFER_BYTES) for _ in range(2))  # begin with a page, as the disk wants
            writing: Future[None] | None = None
            size = filled = 0
            for part in parts:
                while part:
                    piece, part = part[: _BUFFER_BYTES - filled], part[_BUFFER_BYTES - filled :]
                    buffer[filled : filled + len(piece)] = piece
                    filled, size = filled + len(piece), size + len(piece)
                    if filled == _BUFFER_BYTES:
                        if writing is not None:
                            writing.result()
                        writing = pool.submit(_write, file, buffer, filled)
                        buffer, other, filled = other, buffer, 0
            if writing is not None:
                writing.result()
            _write(file, buffer, -(-filled // mmap.PAGESIZE) * mmap.PAGESIZE)  # whole pages, and cut below
        os.ftruncate(file, size)
        os.fsync(file)
    finally:
        os.close(file)


def _write(file: int, buffer: mmap.mmap, size: int) -> None:
    """Writes the first bytes of a buffer."""
    rest = memoryview(buffer)[:size]
    while rest:
        try:
            rest = rest[os.write(file, rest) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(file, fcntl.F_GETFL) & _DIRECT:
                raise
            _set_direct(file, False)  # a file system that has no way past the cache, or wants larger pieces


def _set_direct(file: int, is_direct: bool) -> None:
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | _DIRECT if is_direct else flags & ~_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:  # as above
            raise
