"""Folders that `datasets.save_to_disk` wrote, read from their Arrow files alone: nothing is unpickled or run."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.data.sources import Source
from gemma4_jax.data.sources.files import as_file, read_inside
from gemma4_jax.data.sources.fingerprint import files_fingerprint
from gemma4_jax.data.sources.parquet import MAX_ROW_BYTES
from gemma4_jax.errors import InputError, reason_of


class DatasetsSource(Source):
    """The rows of one split: images and sounds as {"bytes", "path"}, class labels by name.

    Files are mapped into memory, so that a row costs what is in it.

    Args:
      path: of the folder with state.json, on a disk.
    Raises:
      InputError: pyarrow is not installed, there is no such folder, or it cannot be read.
    """

    def __init__(self, path: str) -> None:
        folder = as_file(path)
        if not isinstance(folder, Path):
            raise InputError(f"Arrow files are mapped from a disk: mount the bucket of {path}, or copy its files.")
        if (folder / "dataset_dict.json").is_file():
            splits = ", ".join(_read_json(folder, "dataset_dict.json").get("splits", ()))
            raise InputError(f"{folder} holds several splits, {splits:.200}: give the folder of one.")
        files = _read_json(folder, "state.json").get("_data_files")
        given = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
        names = [name for name in given if isinstance(name, str) and Path(name).name == name]
        if not names or len(names) < len(given):
            raise InputError(f"{folder}/state.json names no Arrow files in its folder: save the data set again.")
        self._paths = [folder / name for name in names]
        self._opened: list[Any] | None = None
        sizes = [batch.num_rows for batch in self._batches()]
        self._stops = np.cumsum(sizes, dtype=np.int64)
        self.columns = self._batches()[0].schema.names if sizes else None
        self._label_names = _label_names(_read_json(folder, "dataset_info.json").get("features"))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._stops, index, side="right"))
        row = index - (int(self._stops[number - 1]) if number else 0)
        try:
            record = self._batches()[number].slice(row, 1)
            if record.nbytes > MAX_ROW_BYTES:
                raise InputError(f"a row of {record.nbytes} bytes is refused: at most {MAX_ROW_BYTES} are read.")
            record.validate(full=True)  # its offsets are of the file, and lead anywhere
            (values,) = record.to_pylist()
        except InputError:
            raise
        except Exception as error:  # damaged files end in exceptions of several kinds
            raise InputError(f"it cannot be read ({reason_of(error)}).") from error
        for name, labels in self._label_names.items():
            label = values.get(name)
            if isinstance(label, int) and 0 <= label < len(labels):
                values[name] = labels[label]
        return values

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "datasets", "documents": len(self), **files_fingerprint(self._paths)}

    def name(self, index: int) -> str:
        return f"{self._paths[0].parent.name} row {index + 1}"

    def read_file(self, index: int, path: str, what: str) -> bytes:
        return read_inside(self._paths[0].parent, path, what)

    def _batches(self) -> list[Any]:
        """Of all files, mapped."""
        if self._opened is None:
            self._opened = [batch for path in self._paths for batch in _batches_of(path)]
        return self._opened


def _batches_of(path: Path) -> list[Any]:
    try:
        arrow = importlib.import_module("pyarrow")  # of an extra, and heavy
    except ImportError as error:
        raise InputError("Arrow files need pyarrow: install it, as `gemma4-jax[parquet]` does.") from error
    try:
        with arrow.ipc.open_stream(arrow.memory_map(str(path))) as stream:
            batches = list(stream)
            list(stream.schema.names)  # which are decoded as they are asked for
            if sum(batch.nbytes for batch in batches) > path.stat().st_size:
                raise ValueError("it is compressed")
            return batches
    except Exception as error:  # damaged files end in exceptions of several kinds
        raise InputError(f"{path} cannot be read as a stream of Arrow ({reason_of(error)}).") from error


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_bytes())
    except OSError as error:
        raise InputError(
            f"{folder}/{name} cannot be read ({error.strerror}): give a folder that datasets.save_to_disk wrote."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder}/{name} is no JSON ({type(error).__name__}): save the data set again.") from error
    return value if isinstance(value, dict) else {}


def _label_names(features: Any) -> dict[str, list[str]]:
    """Column -> the names of its class labels."""
    found = features if isinstance(features, dict) else {}
    return {
        name: list(map(str, feature["names"]))
        for name, feature in found.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }
