"""Temporary files of this process: what is found in files of others once, and read again and again."""

import functools
import os
import tempfile
from pathlib import Path

from gemma4_jax.errors import InputError


@functools.cache
def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Where they are."""
    return tempfile.TemporaryDirectory(prefix="gemma4-data-")


def scratch_file(name: str) -> Path:
    """A new empty file, where TMPDIR says; it is gone when the process ends.

    Args:
      name: its own ends like this.
    Raises:
      InputError: no folder for such files can be written.
    """
    try:
        number, path = tempfile.mkstemp(dir=scratch_folder().name, suffix=f"-{name[-100:]}")
    except OSError as error:
        raise InputError(f"no temporary file can be written ({error.strerror}): set TMPDIR to a folder.") from error
    os.close(number)
    return Path(path)
