"""Where the files of a tar lie, by their headers alone."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from gemma4_jax.data.sources.files import File
from gemma4_jax.errors import InputError

MAX_HEADER_BYTES = 2**16
"""Of what stands before a file: a longer name is refused before it is read."""

_BLOCK = tarfile.BLOCKSIZE


def find_members(readable: File, path: File) -> Iterator[tuple[str, int, int]]:
    """(name, offset of its bytes, their number) of every plain file in a tar; hidden ones are left out.

    Args:
      readable: the tar itself.
      path: of the file, for messages, which may be compressed.
    Raises:
      InputError: it cannot be read, or is no tar.
    """
    try:
        with readable.open("rb") as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            tar.firstmember = None  # which it has read, to know that it is a tar
            tar.offset = 0
            while True:
                yield from _plain_members(file, tar)
                file.seek(max(0, tar.offset - 1))  # from elsewhere, the library looks whether the last file is whole
                if (member := tar.next()) is None:
                    break
                tar.members = []  # which it keeps, and which would be all
                if member.isreg() and not member.issparse() and not _is_hidden(member.name):
                    yield member.name, member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(_BLOCK).strip(b"\0"):  # which the library takes for the end
                raise tarfile.ReadError(f"bad header at {tar.offset}")
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as a tar file ({error}): it is damaged, or another format.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _plain_members(file: BinaryIO, tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    """Those from the place of `tar` on whose headers say nothing but a name and a size: most that there are, and the
    library takes several times as long for each. Every other header is left to it."""
    while not tar.pax_headers:  # which would be of all that follow
        file.seek(tar.offset)
        if (found := _plain(file.read(_BLOCK))) is None:
            return
        name, size = found
        if not _is_hidden(name):
            yield name, tar.offset + _BLOCK, size
        tar.offset += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _plain(header: bytes) -> tuple[str, int] | None:
    """(name, size) by a whole header of a regular file; None of any other."""
    if len(header) < _BLOCK or header[156:157] != tarfile.REGTYPE or header[257:262] != b"ustar":
        return None
    size, checksum = header[124:136].strip(b" \0"), header[148:156].strip(b" \0")
    if not size.isdigit() or not checksum.isdigit():
        return None
    try:
        # Most bytes are 0, and to add them up takes long.
        if int(checksum, 8) != sum(header.translate(None, b"\0")) - sum(header[148:156]) + 256:
            return None
        number = int(size, 8)
    except ValueError:
        return None
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return (prefix + b"/" * bool(prefix) + name).decode("utf-8", "surrogateescape"), number


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


class _Headers:
    """A file of which only small parts are read, for a tar says of itself how long its headers are."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)
