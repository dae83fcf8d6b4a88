"""Your own records: one JSON object a line, or an array of them, with images in files beside them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.data.sources import Source
from gemma4_jax.data.sources.files import find_files, find_folder, read_inside
from gemma4_jax.data.sources.records import Record, files_fingerprint, find_records, read_record, record_at
from gemma4_jax.data.sources.unpack import unpacked
from gemma4_jax.errors import InputError


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
        self._readable = [unpacked(file) for file in self._paths]
        found = [find_records(file) for file in self._paths]
        self._units = [unit for unit, _ in found]
        self._records = np.concatenate([records for _, records in found])
        self._stops = np.cumsum([len(records) for _, records in found])
        self._folder = find_folder(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, record = self._locate(index)
        try:
            with self._readable[number].open("rb") as file:
                return json.loads(read_record(file, record))
        except OSError as error:
            raise InputError(f"the file cannot be read: {error.strerror}.") from error
        except RecursionError as error:
            raise InputError("its JSON is nested too deeply.") from error
        except InputError:
            raise
        except ValueError as error:  # bad JSON and bad UTF-8
            raise InputError(str(error)) from error

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "jsonl", "documents": len(self), **files_fingerprint(self._paths)}

    def name(self, index: int) -> str:
        number, record = self._locate(index)
        return f"{self._paths[number].name} {self._units[number]} {record.number}"

    def read_file(self, index: int, path: str, what: str) -> bytes:
        number, _ = self._locate(index)
        return read_inside(self._folder or Path(os.path.realpath(self._paths[number].parent)), path, what)

    def _locate(self, index: int) -> tuple[int, Record]:
        """(number of its file, where it is in that)."""
        return int(np.searchsorted(self._stops, index, side="right")), record_at(self._records, index)
