"""Your own records: one JSON object a line, or an array of them, with images in files beside them."""

from typing import Any

from gemma4_jax.data.sources import Source
from gemma4_jax.data.sources.files import find_files, find_folder, read_inside
from gemma4_jax.data.sources.fingerprint import files_fingerprint
from gemma4_jax.data.sources.records import find_records, parse_json


class JsonlSource(Source):
    """The objects of JSON Lines files, file by file and line by line; blank lines are left out.

    Args:
      path: of the files, see `find_files`. Each may also hold one JSON array, and be compressed, see `unpacked`.
      files: the folder that paths in records are relative to, and must stay inside; empty for that of their file.
    Raises:
      InputError: a file cannot be read.
    """

    def __init__(self, path: str, *, files: str = "") -> None:
        self._paths = find_files(path)
        self._records = find_records(self._paths)
        self._folder = find_folder(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return parse_json(self._records.read(index))

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "jsonl", "documents": len(self), **files_fingerprint(self._paths)}

    def name(self, index: int) -> str:
        return self._records.name(index)

    def read_file(self, index: int, path: str, what: str) -> bytes:
        return read_inside(self._folder or self._paths[self._records.file_of(index)].parent, path, what)
