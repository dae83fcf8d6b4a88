"""The iterator of the training batches: one place in the data, whoever reads it, checked before it is gone back to."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain

from gemma4_jax.batch import Batch
from gemma4_jax.data.example import Example
from gemma4_jax.data.packer import Packer
from gemma4_jax.errors import InputError

FORMAT = 4
"""Of the state; a change that earlier states cannot be read with counts it up."""


class PackedRows(grain.IterDataset):
    """Endless batches, or parts of batches, of rows of which each comes from a sequence of documents of its own.

    Args:
      shards: the sequences, by number: row r of a batch is packed from shard r.
      make_packers: one for each of these shards, in this order.
      write: makes a batch of rows.
      num_threads: that pack rows, and decode their images, at one time.
    """

    def __init__(
        self,
        shards: Sequence[int],
        make_packers: Callable[[Sequence[int]], list[Packer]],
        write: Callable[[Sequence[Sequence[Example]]], Batch],
        num_threads: int,
    ) -> None:
        super().__init__()
        self._shards = shards
        self._make_packers = make_packers
        self._write = write
        self._num_threads = num_threads

    def __iter__(self) -> "_PackedRowsIterator":
        packers = dict(zip(map(str, self._shards), self._make_packers(self._shards), strict=True))
        return _PackedRowsIterator(packers, self._write, self._num_threads)


class _PackedRowsIterator(grain.DatasetIterator):
    def __init__(
        self,
        packers: Mapping[str, Packer],
        write: Callable[[Sequence[Sequence[Example]]], Batch],
        num_threads: int,
    ) -> None:
        super().__init__()
        self._packers = packers
        self._write = write
        self._num_threads = num_threads

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, "pack")

    def __next__(self) -> Batch:
        rows = list(self._pool.map(Packer.next_row, self._packers.values()))
        return self._write([row or [] for row in rows])

    def get_state(self) -> dict[str, Any]:
        return {"shards": {shard: packer.get_state() for shard, packer in self._packers.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        for shard, packer in self._packers.items():
            packer.set_state(state["shards"][shard])


def num_threads(num_workers: int) -> int:
    """Threads of a process that packs, so that there are as many as processors in all."""
    return max(1, (os.cpu_count() or 1) // max(1, num_workers))


class TrainIterator(grain.DatasetIterator):
    """Batches, and a state that says where each row of a batch stands in its own sequence of documents.

    The states of all processes together, joined by `join_states`, are the state of the run: any number of processes and
    workers goes on from it.

    Args:
      parent: yields the batches.
      num_shards: rows in a global batch.
      fingerprints: source -> what its documents are known by.
    """

    def __init__(
        self, parent: grain.DatasetIterator, num_shards: int, fingerprints: Mapping[str, Mapping[str, Any]]
    ) -> None:
        super().__init__(parent)
        self._num_shards = num_shards
        self.fingerprints = fingerprints

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"format": FORMAT, "num_shards": self._num_shards, "shards": _shards_in(self._parent.get_state())}

    def set_state(self, state: Any) -> None:
        """Goes on where the iterators stood that gave this state.

        Args:
          state: of one, or of all processes, joined.
        Raises:
          InputError: it is no such state, or of another format or batch size.
        """
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise InputError(
                "The place in the data is damaged, or was saved by another version of this package: go on with that "
                "version, or begin another run_dir from the parameters of this run (init.from_run)."
            )
        if state.get("num_shards") != self._num_shards:
            raise InputError(
                f"data.batch_size={self._num_shards} is not possible: this run was saved with "
                f"{state.get('num_shards')!r:.20}, and each row of a batch has its own place in the data."
            )
        try:
            self._parent.set_state(_with_shards(self._parent.get_state(), state["shards"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"The place in the data is damaged ({type(error).__name__}: {error}): go on from an earlier "
                "checkpoint, or begin another run_dir from the parameters of this run (init.from_run)."
            ) from error


def join_states(states: Iterable[Any]) -> Any:
    """The state of a run, of the states of the iterators of all its processes at one step."""
    joined: dict[str, Any] = {}
    for state in states:
        if not isinstance(state, dict) or not isinstance(state.get("shards"), dict):
            return state  # `TrainIterator.set_state` says that it is none
        joined = {**state, "shards": joined.get("shards", {}) | state["shards"]}
    return joined


def _shards_in(state: Any) -> dict[str, Any]:
    """The states of the shards, wherever Grain keeps them in its own."""
    if isinstance(state, dict) and "shards" in state:
        return state["shards"]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return {shard: found for child in children for shard, found in _shards_in(child).items()}


def _with_shards(state: Any, shards: Mapping[str, Any]) -> Any:
    """Grain's state with other states of the shards in their places."""
    if isinstance(state, dict) and "shards" in state:
        return {"shards": {shard: shards[shard] for shard in state["shards"]}}
    if isinstance(state, dict):
        return {name: _with_shards(child, shards) for name, child in state.items()}
    return [_with_shards(child, shards) for child in state] if isinstance(state, list | tuple) else state


def read_counters(iterator: TrainIterator) -> dict[str, dict[str, int]]:
    """What this process has done with the documents of each source: source -> `tally.COUNTERS`.

    It counts up to the last batch taken, from the start of the run: the counts are part of the iterator's state.
    """
    return add_counters(shard["tally"] for shard in iterator.get_state()["shards"].values())


def add_counters(all_counters: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """The sums of the counters of each source."""
    totals: dict[str, dict[str, int]] = {}
    for by_source in all_counters:
        for source, counters in by_source.items():
            total = totals.setdefault(source, dict.fromkeys(counters, 0))
            for name, count in counters.items():
                total[name] += count
    return dict(sorted(totals.items()))
