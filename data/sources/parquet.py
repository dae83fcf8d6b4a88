"""Parquet files, as most sets on the hub are: rows by index, read in row groups."""

import importlib
from collections import OrderedDict
from typing import Any

import numpy as np

from gemma4_jax.data.sources import Source
from gemma4_jax.data.sources.files import File, find_files, find_folder, read_inside
from gemma4_jax.data.sources.fingerprint import files_fingerprint
from gemma4_jax.data.sources.remote import RemotePath
from gemma4_jax.errors import InputError, reason_of

MAX_GROUP_BYTES, MAX_GROUP_ROWS = 2**30, 2**20
"""Of a row group, which is read whole: a file with a larger one is refused."""

MAX_ROW_BYTES = 2**26
"""A larger row is refused before it becomes Python objects."""

CACHE_BYTES = 2**28
"""Of the row groups that are kept, the latest used; one is, whatever its size."""


class ParquetSource(Source):
    """The rows of Parquet files, file by file, each a dictionary of its columns; files in them as {"bytes", "path"}.

    A random row costs the reading of its row group, unless that is among those kept. So small groups are read fastest:
    `pyarrow.parquet.write_table(table, path, row_group_size=100)`.

    Args:
      path: of the files, see `find_files`; all have the same columns.
      files: the folder that paths in rows are relative to, and must stay inside; empty for that of their file.
    Raises:
      InputError: pyarrow is not installed, a file cannot be read, has other columns, or too large a row group.
    """

    def __init__(self, path: str, *, files: str = "") -> None:
        parquet = _pyarrow_parquet()
        self._paths = find_files(path)
        groups: list[tuple[int, int]] = []  # (number of its file, which of its groups)
        sizes: list[int] = []
        for number, file in enumerate(self._paths):
            try:
                metadata = parquet.read_metadata(_opened(file))
                columns = metadata.schema.to_arrow_schema().names
            except InputError:
                raise
            except Exception as error:  # damaged files end in exceptions of several kinds
                raise InputError(f"{file} cannot be read as Parquet ({reason_of(error)}).") from error
            if self.columns is None:
                self.columns = columns
            elif sorted(columns) != sorted(self.columns):
                raise InputError(
                    f"{file} has the columns {', '.join(columns)}, and {self._paths[0]} has {', '.join(self.columns)}: "
                    "make two sources of them."
                )
            for i in range(metadata.num_row_groups):
                group = metadata.row_group(i)
                if group.total_byte_size > MAX_GROUP_BYTES or group.num_rows > MAX_GROUP_ROWS:
                    raise InputError(
                        f"{file} has a row group of {group.num_rows} rows and {group.total_byte_size} bytes, and at "
                        f"most {MAX_GROUP_ROWS} and {MAX_GROUP_BYTES} are read: write it again with a smaller "
                        "row_group_size."
                    )
                groups.append((number, i))
                sizes.append(group.num_rows)
        self._groups = np.array(groups, np.int64).reshape(-1, 2)
        self._stops = np.cumsum(sizes, dtype=np.int64)
        self._folder = find_folder(files)
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, row = self._locate(index)
        try:
            record = self._table(group).slice(row, 1)
            if record.nbytes > MAX_ROW_BYTES:
                raise InputError(f"a row of {record.nbytes} bytes is refused: at most {MAX_ROW_BYTES} are read.")
            return record.to_pylist()[0]
        except InputError:
            raise
        except Exception as error:  # damaged files end in exceptions of several kinds
            raise InputError(f"it cannot be read ({reason_of(error)}).") from error

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "parquet", "documents": len(self), **files_fingerprint(self._paths)}

    def name(self, index: int) -> str:
        group, _ = self._locate(index)
        number = self._groups[group, 0]
        first = np.searchsorted(self._groups[:, 0], number)  # group of the file
        before = int(self._stops[first - 1]) if first else 0
        return f"{self._paths[number].name} row {index - before + 1}"

    def read_file(self, index: int, path: str, what: str) -> bytes:
        number = self._groups[self._locate(index)[0], 0]
        return read_inside(self._folder or self._paths[number].parent, path, what)

    def _locate(self, index: int) -> tuple[int, int]:
        """(its row group, of those of all files, and its row in that)."""
        group = int(np.searchsorted(self._stops, index, side="right"))
        return group, index - (int(self._stops[group - 1]) if group else 0)

    def _table(self, group: int) -> Any:
        """The rows of a group, kept as long as there is room for them."""
        if group not in self._kept:
            number, inside = self._groups[group].tolist()
            with _pyarrow_parquet().ParquetFile(_opened(self._paths[number])) as file:
                self._kept[group] = file.read_row_group(inside, use_threads=False)
            while len(self._kept) > 1 and sum(table.nbytes for table in self._kept.values()) > CACHE_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]


def _opened(file: File) -> Any:
    """What pyarrow reads: a path, or a stream without a buffer, for it knows which ranges it needs."""
    try:
        return file.open(buffering=0) if isinstance(file, RemotePath) else file
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error


def _pyarrow_parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")  # of an extra, and heavy
    except ImportError as error:
        raise InputError("Parquet needs pyarrow: install it, as `gemma4-jax[parquet]` does.") from error
