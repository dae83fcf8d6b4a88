"""Several sources as one endless sequence of examples."""

import functools
import math
import sys
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from gemma4_jax.data.document import Source
from gemma4_jax.data.sources import open_source
from gemma4_jax.data.tokenize import DocumentTokenizer, TokenizedSource
from gemma4_jax.errors import InputError

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


def open_sources(data: Any) -> dict[str, Source]:
    """Name -> source of all that `data.mixture` draws from.

    Args:
      data: `config.data`; mixture, sources and seed are read.
    Raises:
      InputError: if the mixture is not possible, or a source cannot be read or is empty.
    """
    weights = {name: weight for name, weight in sorted(data.mixture.items()) if weight != 0}
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights.values()):
        raise InputError(
            f"data.mixture={dict(data.mixture)} is not possible: it must give at least one source a weight above 0, "
            "and none a weight below 0."
        )
    if not 0 <= data.seed < 2**32:
        raise InputError(f"data.seed={data.seed} is not possible: it must be between 0 and 2**32 - 1.")
    return {name: open_source(source_spec(data, name), seed=data.seed) for name in weights}


def mix_sources(data: Any, sources: Mapping[str, Source], tokenize: DocumentTokenizer) -> grain.MapDataset:
    """The endless sequence that all processes share: by index, an `Example` or `Unreadable`.

    Every source is in a random order, another one in each of its epochs.

    Args:
      data: `config.data`; mixture and seed are read.
      sources: what `open_sources` opened.
      tokenize: makes examples of documents.
    """
    shuffled = []
    for number, (name, source) in enumerate(sources.items()):
        dataset = grain.MapDataset.source(TokenizedSource(name, source, tokenize))
        # Grain counts its seed up with the epochs: drawn at random, those of two runs do not meet.
        seed = np.random.default_rng((data.seed, number)).integers(2**32)
        shuffled.append(dataset.shuffle(seed=int(seed)).repeat())
    return grain.MapDataset.select_from_datasets(shuffled, Turns([data.mixture[name] for name in sources], data.seed))


def source_spec(data: Any, name: str) -> str:
    """What `data.mixture` means by a name: an entry of `data.sources`, or else a source without an argument."""
    return data.get("sources", {}).get(name, name)
