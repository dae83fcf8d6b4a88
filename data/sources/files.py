"""The files of a source, and files beside the records that name them: inside one folder, and nowhere else."""

import glob
import os
import re
from pathlib import Path

from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path

MAX_FILE_BYTES = 2**26
"""A larger file is refused before it is read."""


def find_files(given: str) -> list[Path]:
    """The files that a path means, each once, sorted.

    Args:
      given: a path; several with commas between them; in each, `*`, `?` and `[...]` stand for parts of names, and `**`
        for folders. What is there under the very name is that.
    Raises:
      InputError: there is nothing that a pattern stands for, or it is no local path.
    """
    if os.path.exists(local_path(given)):  # which is False, too, of what cannot be a name
        return [local_path(given)]
    files: set[Path] = set()
    for one in filter(None, (part.strip() for part in given.split(","))):
        path = local_path(one)
        if os.path.exists(path) or not glob.has_magic(one):
            files.add(path)
            continue
        found = [Path(name) for name in glob.iglob(str(path), recursive=True)]
        if not any(map(Path.is_file, found)):
            raise InputError(f"no file is called {one!r}: mend the pattern, or put files there.")
        files.update(filter(Path.is_file, found))
    if not files:
        raise InputError(f"the path {given!r} names no file.")
    return sorted(files)


def find_folder(given: str) -> Path | None:
    """The folder of the option `files`, None where that is empty.

    Raises:
      InputError: it is no folder.
    """
    if not given:
        return None
    folder = local_path(given)
    if not folder.is_dir():
        raise InputError(
            f"options.files={given!r} is not a folder: give the one that paths in records are relative to."
        )
    return Path(os.path.realpath(folder))


def read_inside(folder: Path, given: str, what: str) -> bytes:
    """The bytes of a file that a record names.

    Args:
      folder: that the file must stay inside, with every link of its path followed.
      given: path relative to the folder, not yet trusted.
      what: the file is, for messages.
    Raises:
      InputError: it is no file inside the folder, is too large, or cannot be read.
    """
    try:
        return _path_of(folder, given, f"the {what} {given!r:.100}").read_bytes()
    except OSError as error:
        raise InputError(f"the {what} {given!r:.100} cannot be read: {error.strerror}.") from error
    except InputError:
        raise
    except ValueError as error:  # a zero byte, or half of a character
        raise InputError(f"the {what} {given!r:.100} cannot be read: {error}.") from error


def _path_of(folder: Path, given: str, file: str) -> Path:
    """The file, once it is known to be one that may be read."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", given):
        raise InputError(f"{file} is a URL: save it as a file beside this one, and name that file.")
    path = Path(os.path.realpath(folder / given))
    if not path.is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{file} lies outside the folder of the file: move it inside.")
    if path.is_symlink():  # even now: realpath has followed every link that leads anywhere
        raise InputError(f"{file} is a link that leads back to itself: give the file itself.")
    if not path.exists():
        raise InputError(f"{file} is missing: put it into {folder}, or mend its path.")
    if not path.is_file():
        raise InputError(f"{file} is not a file: give the path of one.")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise InputError(f"{file} has {size} bytes, and at most {MAX_FILE_BYTES} are read: make it smaller.")
    return path
