"""Plain text: every file a document."""

from typing import Any

from gemma4_jax.data.sources import Source
from gemma4_jax.data.sources.files import File, files_in, find_files, read_range, size_of
from gemma4_jax.data.sources.fingerprint import files_fingerprint
from gemma4_jax.data.sources.records import MAX_RECORD_BYTES
from gemma4_jax.errors import InputError

MAX_FILES = 2**20
"""Of a source."""


class TextSource(Source):
    """Text files, each a record with the column `text`.

    Args:
      path: of the files, see `find_files`; of a folder, all files in it and in its folders.
    Raises:
      InputError: there are none, or more than `MAX_FILES`.
    """

    columns = ("text",)

    def __init__(self, path: str) -> None:
        found: dict[str, File] = {}
        for one in find_files(path):
            try:
                found |= {str(file): file for file in (files_in(one) if one.is_dir() else [one])}
            except OSError as error:
                raise InputError(f"{one} cannot be read: {error.strerror}.") from error
        self._paths = [found[name] for name in sorted(found)]
        if len(self._paths) > MAX_FILES:
            raise InputError(
                f"{path} brings {len(self._paths)} files, and at most {MAX_FILES} are read: write them as JSON Lines."
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        try:
            if not path.is_file():
                raise InputError("it is not a file.")
            if (size := size_of(path)) > MAX_RECORD_BYTES:
                raise InputError(f"a file of {size} bytes is refused: at most {MAX_RECORD_BYTES} are read.")
            text = read_range(path, 0, size).decode("utf-8-sig")
        except OSError as error:
            raise InputError(f"it cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise InputError(f"it is not text in UTF-8 ({error}).") from error
        if "\0" in text:
            raise InputError("it is binary, or text in UTF-16: give text in UTF-8.")
        return {"text": text}

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "text", "documents": len(self), **files_fingerprint(self._paths)}

    def name(self, index: int) -> str:
        return str(self._paths[index])
