"""Several sources as one endless sequence of examples."""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from gemma4_jax.data.document import Document
from gemma4_jax.data.documents import Documents, open_documents
from gemma4_jax.data.encode import Encoder, Example, Unreadable
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import DataConfig

ROUND = 10_000
"""Turns in a round, about: in every round each source has its share of turns, to the nearest one and at least one."""


class Turns(grain.transforms.DatasetSelectionMap):
    """Whose turn it is: position in the mixture -> (source, index in that source).

    Each source is read in order. The turns of a round are shuffled, so that no shard of the sequence falls in step
    with one source.

    Args:
      weights: of the sources, above 0; relative to their sum.
      seed: of the shuffle.
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        shares = np.array(weights) / sum(weights)
        self._turns = np.maximum(1, np.round(shares * ROUND)).astype(int)
        self._seed = seed

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        number, place = divmod(index, int(self._turns.sum()))
        sources, ranks = _shuffled_round(tuple(self._turns.tolist()), self._seed, number)
        source = int(sources[place])
        return source, number * int(self._turns[source]) + int(ranks[place])


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
    """

    def __init__(self, name: str, documents: Sequence[Document] | Documents, encode: Encoder) -> None:
        self._name = name
        self._documents = documents
        self._encode = encode

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Example | Unreadable:
        try:
            return dataclasses.replace(self._encode(self._documents[index]), source=self._name)
        except InputError as error:
            return Unreadable(str(error), self._name)


def open_sources(data: DataConfig) -> dict[str, Documents]:
    """Name -> documents of all sources that are drawn from.

    Raises:
      InputError: one cannot be read or is empty.
    """
    return {name: open_documents(source, seed=data.seed) for name, source in data.mixture.items()}


def mix_sources(data: DataConfig, sources: Mapping[str, Documents], encode: Encoder) -> grain.MapDataset:
    """The endless sequence that all processes share: by index, an `Example` or `Unreadable`.

    Every source is in a random order, another one in each of its epochs.

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
    weights = [data.mixture[name].weight for name in sources]
    return grain.MapDataset.select_from_datasets(shuffled, Turns(weights, data.seed))
