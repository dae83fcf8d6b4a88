"""Where records come from: one file a format, imported when it is used, and the table of kinds."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma4_jax.errors import InputError


class Source(abc.ABC):
    """Records by index, and nothing more: `data.tasks` says what becomes of one.

    `source[i]` is the same record whenever and wherever it is asked for. Sources are pickled for worker processes.

    Attributes:
      columns: what every record has, where that is known before one is read; None where it is not.
      encoding: of records that were prepared, what they were encoded with, see `data.prepared.encoding_of`.
    """

    columns: Sequence[str] | None = None
    encoding: Mapping[str, Any] | None = None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """A record.

        Raises:
          InputError: it cannot be read; it is then counted, named and left out.
        """

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What the records are known by, wherever they lie: a JSON object that differs where they do.

        A run that goes on compares it.
        """

    def name(self, index: int) -> str:
        """What messages call a record."""
        return f"record {index}"

    def read_file(self, index: int, path: str, what: str) -> bytes:
        """A file beside the records which one of them names.

        Args:
          index: of the record.
          path: as the record has it, not yet trusted.
          what: it is, for messages.
        Raises:
          InputError: it cannot be read.
        """
        raise InputError(f"the {what} {path!r:.100} is a path, and this source has no files: give bytes or pixels.")


def _digits(split: str, seed: int) -> Source:
    from gemma4_jax.data.sources.digits import DigitsSource

    return DigitsSource(split, seed)


def _python(split: str) -> Source:
    from gemma4_jax.data.sources.python_source import PythonSource

    return PythonSource(split)


def _jsonl(path: str, *, files: str = "") -> Source:
    from gemma4_jax.data.sources.jsonl import JsonlSource

    return JsonlSource(path, files=files)


def _parquet(path: str, *, files: str = "") -> Source:
    from gemma4_jax.data.sources.parquet import ParquetSource

    return ParquetSource(path, files=files)


def _webdataset(path: str) -> Source:
    from gemma4_jax.data.sources.webdataset import WebdatasetSource

    return WebdatasetSource(path)


def _datasets(path: str) -> Source:
    from gemma4_jax.data.sources.datasets import DatasetsSource

    return DatasetsSource(path)


def _arrayrecord(path: str) -> Source:
    from gemma4_jax.data.sources.array_record import ArrayRecordSource

    return ArrayRecordSource(path)


def _text(path: str) -> Source:
    from gemma4_jax.data.sources.text_files import TextSource

    return TextSource(path)


def _tfds(path: str, *, data_dir: str = "") -> Source:
    from gemma4_jax.data.sources.tfds import TfdsSource

    return TfdsSource(path, data_dir=data_dir)


def _prepared(path: str, split: str) -> Source:
    from gemma4_jax.data.sources.prepared import PreparedSource

    return PreparedSource(path, split)


KINDS: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "python": _python,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "webdataset": _webdataset,
    "datasets": _datasets,
    "arrayrecord": _arrayrecord,
    "text": _text,
    "tfds": _tfds,
    "prepared": _prepared,
}
"""Kind -> what opens a source of it: a class or a function, whose parameters say what it takes.

`path` is where the records are; `split` is "train" or "held_out", for a kind that holds documents back by itself;
`seed` is of documents that are made up as they are read. Every other parameter is one of `data.sources.NAME.options`.
"""
