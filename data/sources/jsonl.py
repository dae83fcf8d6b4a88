"""Your own records: one JSON object a line, or an array of them, with images in files beside it."""

import json
import os
from pathlib import Path
from typing import Any

from gemma4_jax.data.sources import Source
from gemma4_jax.data.sources.files import read_inside
from gemma4_jax.data.sources.records import file_fingerprint, find_records, read_record, record_at
from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path


class JsonlSource(Source):
    """The objects of a JSON Lines file, in the order of its lines; blank lines are left out.

    Args:
      path: of the file, which may also hold one JSON array. Paths of images in it are relative to its folder and must
        stay inside it.
    Raises:
      InputError: the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = local_path(path)
        self._folder = Path(os.path.realpath(self._path.parent))
        self._unit, self._records = find_records(self._path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with self._path.open("rb") as file:
                return json.loads(read_record(file, record_at(self._records, index)))
        except OSError as error:
            raise InputError(f"the file cannot be read: {error.strerror}.") from error
        except RecursionError as error:
            raise InputError("its JSON is nested too deeply.") from error
        except InputError:
            raise
        except ValueError as error:  # bad JSON and bad UTF-8
            raise InputError(str(error)) from error

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "jsonl", "documents": len(self), **file_fingerprint(self._path)}

    def name(self, index: int) -> str:
        return f"{self._path.name} {self._unit} {record_at(self._records, index).number}"

    def read_file(self, path: str, what: str) -> bytes:
        return read_inside(self._folder, path, what)
