"""Several sources as one sequence of examples."""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from gemma4_jax.data.document import Document
from gemma4_jax.data.documents import Documents, open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.example import SizedExample, Unreadable
from gemma4_jax.data.prepared import check_encoding
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import DataConfig

ROUND = 10_000
"""Turns in a round, about: in every round each source has its share of turns, to the nearest one and at least one."""


class Turns(grain.transforms.DatasetSelectionMap):
    """Whose turn it is: position in the mixture -> (source, index in that source).

    Each source is read in order. The turns of a round are shuffled, so that no shard of the sequence falls in step
    with one source.

    A source that has been read as often as it may be drops out: its turns go to a last one, behind the sources. Or all
    ends with its last turn.

    Args:
      weights: of the sources, above 0; relative to their sum.
      ends: of the sources, documents after which each drops out; None for never.
      seed: of the shuffle.
      stopping: sources, by number, with which all ends.
    """

    def __init__(self, weights: list[float], ends: list[int | None], seed: int, stopping: Sequence[int] = ()) -> None:
        shares = np.array(weights) / sum(weights)
        self._turns = np.maximum(1, np.round(shares * ROUND)).astype(int)
        self._ends = ends
        self._seed = seed
        last = [self._place(source, end - 1) for source in stopping if (end := ends[source]) is not None]
        self._len = min(last, default=sys.maxsize - 1) + 1

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> tuple[int, int]:
        number, place = divmod(index, int(self._turns.sum()))
        sources, ranks = self._round(number)
        source = int(sources[place])
        taken, end = number * int(self._turns[source]) + int(ranks[place]), self._ends[source]
        return (source, taken) if end is None or taken < end else (len(self._ends), 0)

    def _place(self, source: int, taken: int) -> int:
        """When it is the turn of a source that has had so many."""
        number, rank = divmod(taken, int(self._turns[source]))
        sources, ranks = self._round(number)
        return number * len(sources) + int(np.flatnonzero((sources == source) & (ranks == rank))[0])

    def _round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return _shuffled_round(tuple(self._turns.tolist()), self._seed, number)


@functools.lru_cache(maxsize=4)
def _shuffled_round(turns: tuple[int, ...], seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """One round: (whose turn each place is, how many turns that source had before it)."""
    sources = np.random.default_rng((seed, number)).permutation(np.repeat(np.arange(len(turns)), turns))
    ranks = np.empty(len(sources), np.int64)
    ranks[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(n) for n in turns])
    return sources, ranks


class Examples:
    """The examples of a source; of a record that cannot be read an `Unreadable`, not an exception.

    Args:
      name: of the source.
      documents: of it.
      encode: makes examples of them.
    Raises:
      InputError: the documents were prepared with another tokenizer, or for another model.
    """

    def __init__(self, name: str, documents: Sequence[Document] | Documents, encode: Encoder) -> None:
        if isinstance(documents, Documents) and documents.encoding is not None:
            check_encoding(documents.encoding, encode, f"data.sources.{name}")
        self._name = name
        self._documents = documents
        self._encode = encode

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> SizedExample | Unreadable:
        try:
            example = self._encode(self._documents[index])
            return dataclasses.replace(example, text=dataclasses.replace(example.text, source=self._name))
        except InputError as error:
            return Unreadable(str(error), self._name)


def open_sources(data: DataConfig) -> dict[str, Documents]:
    """Name -> documents of all sources that are drawn from.

    Raises:
      InputError: one cannot be read or is empty.
    """
    return {name: open_documents(source, seed=data.seed) for name, source in data.mixture.items()}


def mix_sources(data: DataConfig, sources: Mapping[str, Documents], encode: Encoder) -> grain.MapDataset:
    """The sequence that all processes share: by index, a `SizedExample`, an `Unreadable`, or None.

    It is endless, or ends with the last document of a source, if the config says so. None stands where it would be the
    turn of a source that has dropped out. Every source is in a random order, another one in each of its epochs.

    Args:
      data: mixture and seed are read.
      sources: what `open_sources` opened.
      encode: makes examples of documents.
    """
    shuffled = []
    for number, (name, documents) in enumerate(sources.items()):
        dataset = grain.MapDataset.source(Examples(name, documents, encode))
        # Grain counts its seed up with the epochs: drawn at random, those of two runs do not meet.
        seed = np.random.default_rng((data.seed, number)).integers(2**32)
        shuffled.append(dataset.shuffle(seed=int(seed)).repeat())
    settings = [data.mixture[name] for name in sources]
    ends = [setting.epochs * len(sources[setting.name]) if setting.epochs else None for setting in settings]
    stopping = [number for number, setting in enumerate(settings) if setting.name in data.stopping]
    turns = Turns([setting.weight for setting in settings], ends, data.seed, stopping)
    return grain.MapDataset.select_from_datasets([*shuffled, grain.MapDataset.source([None]).repeat()], turns)
