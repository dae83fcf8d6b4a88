"""The files of a source, here or in a bucket, and files beside the records that name them: inside one folder alone."""

import glob
import os
import re
from pathlib import Path, PurePosixPath

from gemma4_jax.data.sources.remote import RemotePath
from gemma4_jax.errors import InputError
from gemma4_jax.files import is_remote, local_path

MAX_FILE_BYTES = 2**26
"""A larger file is refused before it is read."""

File = Path | RemotePath


def find_files(given: str) -> list[File]:
    """The files that a path means, each once, sorted.

    Args:
      given: a path or an address such as gs://bucket/a.jsonl; several with commas between them; in each, `*`, `?` and
        `[...]` stand for parts of names, and `**` for folders. What is there under the very name is that.
    Raises:
      InputError: there is nothing that a pattern stands for, or a bucket cannot be asked.
    """
    if not is_remote(given) and os.path.exists(local_path(given)):  # which is False, too, of what cannot be a name
        return [local_path(given)]
    files: dict[str, File] = {}
    for one in filter(None, (part.strip() for part in given.split(","))):
        found = _files_of(one)
        if not found:
            raise InputError(f"no file is called {one!r}: mend the pattern, or put files there.")
        files |= {str(file): file for file in found}
    if not files:
        raise InputError(f"the path {given!r} names no file.")
    return [files[name] for name in sorted(files)]


def _files_of(one: str) -> list[File]:
    path = as_file(one)
    try:
        if not glob.has_magic(one) or (isinstance(path, RemotePath) and path.exists()) or os.path.exists(str(path)):
            return [path]
        if isinstance(path, RemotePath):
            return list(path.glob())
        return [Path(name) for name in glob.iglob(str(path), recursive=True) if Path(name).is_file()]
    except OSError as error:
        raise InputError(f"{one} cannot be read: {error.strerror}.") from error


def as_file(given: str) -> File:
    """A path or an address that somebody wrote."""
    return RemotePath(given) if is_remote(given) else local_path(given)


def find_folder(given: str) -> File | None:
    """The folder of the option `files`, None where that is empty.

    Raises:
      InputError: it is no folder.
    """
    if not given:
        return None
    folder = as_file(given)
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise InputError(f"options.files={given!r} cannot be read: {error.strerror}.") from error
    if not is_folder:
        raise InputError(
            f"options.files={given!r} is not a folder: give the one that paths in records are relative to."
        )
    return folder


def files_in(folder: File) -> list[File]:
    """All files of a folder and of those in it, but for hidden ones.

    Raises:
      OSError: it cannot be read.
    """
    if isinstance(folder, RemotePath):
        return list((folder / "**").glob())
    paths = (folder / name for name in glob.iglob("**", root_dir=folder, recursive=True))
    return [path for path in paths if path.is_file()]


def version_of(file: File) -> tuple[int, int]:
    """What changes when somebody writes the file again, as far as that can be seen without reading it.

    Raises:
      OSError: it is not there, or cannot be asked for.
    """
    if isinstance(file, RemotePath):
        return file.size(), 0
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def size_of(file: File) -> int:
    """Its bytes.

    Raises:
      OSError: it cannot be read.
    """
    return file.size() if isinstance(file, RemotePath) else file.stat().st_size


def read_range(file: File, start: int, stop: int) -> bytes:
    """The bytes start..stop-1 of a file.

    Raises:
      OSError: it cannot be read.
    """
    if isinstance(file, RemotePath):
        return file.read(start, stop)
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(stop - start)


def read_inside(folder: File, given: str, what: str) -> bytes:
    """The bytes of a file that a record names.

    Args:
      folder: that the file must stay inside, with every link of its path followed.
      given: path relative to the folder, not yet trusted.
      what: the file is, for messages.
    Raises:
      InputError: it is no file inside the folder, is too large, or cannot be read.
    """
    file = f"the {what} {given!r:.100}"
    try:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", given):
            raise InputError(f"{file} is a URL: save it as a file beside this one, and name that file.")
        path = _far_path(folder, given, file) if isinstance(folder, RemotePath) else _near_path(folder, given, file)
        if (size := size_of(path)) > MAX_FILE_BYTES:
            raise InputError(f"{file} has {size} bytes, and at most {MAX_FILE_BYTES} are read: make it smaller.")
        return read_range(path, 0, size)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    except InputError:
        raise
    except ValueError as error:  # a zero byte, or half of a character
        raise InputError(f"{file} cannot be read: {error}.") from error


def _near_path(folder: Path, given: str, file: str) -> Path:
    """The file, once it is known to be one that may be read."""
    folder = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(folder / given))
    if not path.is_relative_to(folder):
        raise InputError(f"{file} lies outside the folder of the file: move it inside.")
    if path.is_symlink():  # even now: realpath has followed every link that leads anywhere
        raise InputError(f"{file} is a link that leads back to itself: give the file itself.")
    if not path.exists():
        raise InputError(f"{file} is missing: put it into {folder}, or mend its path.")
    if not path.is_file():
        raise InputError(f"{file} is not a file: give the path of one.")
    return path


def _far_path(folder: RemotePath, given: str, file: str) -> RemotePath:
    """The same of a file in a bucket, where a name may hold anything, and links are unknown."""
    inside = PurePosixPath(given)
    if inside.is_absolute() or ".." in inside.parts:
        raise InputError(f"{file} lies outside the folder of the file: move it inside.")
    path = folder / str(inside)
    if not path.exists():
        raise InputError(f"{file} is missing: put it into {folder}, or mend its path.")
    if not path.is_file():
        raise InputError(f"{file} is not a file: give the path of one.")
    return path
