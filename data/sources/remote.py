"""Files at addresses such as gs://bucket/a.jsonl or s3://bucket/a.jsonl, read by fsspec."""

import dataclasses
import errno
import io
from collections.abc import Sequence
from typing import Any

from gemma4_jax.errors import InputError, reason_of

PART_BYTES = 2**22
"""Of a file that is read from its beginning, at one time."""


@dataclasses.dataclass(frozen=True)
class RemotePath:
    """An address, with what sources need of `pathlib.Path`. Whatever a library raises becomes an OSError.

    Attributes:
      address: SCHEME://..., in a form that fsspec knows.
    """

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.address.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """What stands after the last slash."""
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The folder."""
        return RemotePath(self.address.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether something is there.

        Raises:
          InputError: no library for the scheme is installed.
          OSError: the store cannot be asked, for example without credentials.
        """
        return self._kind() != ""

    def is_file(self) -> bool:
        """Whether it is a file; errors as in `exists`."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether it is a folder; errors as in `exists`."""
        return self._kind() == "directory"

    def size(self) -> int:
        """Bytes of the file; errors as in `exists`."""
        size = self._ask("info")["size"]
        if size is None:
            raise OSError(errno.EIO, "its server does not say how large it is")
        return size

    def read(self, start: int, stop: int) -> bytes:
        """The bytes start..stop-1; errors as in `exists`."""
        return self._ask("cat_file", start=start, end=stop) if start < stop else b""

    def read_each(self, starts: Sequence[int], length: int) -> list[bytes]:
        """So many bytes from each place, asked for together; errors as in `exists`."""
        path, stops = self._ask("_strip_protocol"), [start + length for start in starts]
        return self._ask("cat_ranges", [path] * len(starts), list(starts), stops, on_error="raise", whole=True)

    def glob(self) -> "list[RemotePath]":
        """The files that the address means as a pattern; errors as in `exists`."""
        found = self._ask("glob", detail=True)
        return [
            RemotePath(self._ask("unstrip_protocol", path, whole=True))
            for path, info in found.items()
            if info["type"] == "file"
        ]

    def open(self, mode: str = "rb", buffering: int = PART_BYTES) -> Any:
        """Opens it to be read, in parts of so many bytes; errors as in `exists`, also while it is read."""
        return io.BufferedReader(_Ranges(self), buffering) if buffering else _Ranges(self)

    def _kind(self) -> str:
        """What fsspec calls it; empty if nothing is there."""
        try:
            return self._ask("info")["type"]
        except FileNotFoundError:
            return ""

    def _ask(self, what: str, *arguments: Any, whole: bool = False, **options: Any) -> Any:
        """Calls a method of the file system: of this path, or, where `whole`, of none but what is given."""
        import fsspec  # most runs do without

        try:
            files, path = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:  # no library, or no such scheme
            raise InputError(f"{self} cannot be read: {reason_of(error)}.") from error
        except Exception as error:
            raise OSError(errno.EIO, reason_of(error)) from error
        try:
            return getattr(files, what)(*(() if whole else (path,)), *arguments, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory") from error
        except Exception as error:  # of the library for the scheme, of any kind
            raise OSError(errno.EIO, reason_of(error)) from error


class _Ranges(io.RawIOBase):
    """A remote file as a stream, of which every read asks for a range."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._place, self._size = path, 0, path.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        content = self._path.read(self._place, min(self._place + len(buffer), self._size))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
