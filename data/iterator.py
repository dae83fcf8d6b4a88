"""The iterator of the training batches: a place in the data that is checked before it is gone back to."""

from collections.abc import Mapping
from typing import Any

import grain

from gemma4_jax.batch import Batch
from gemma4_jax.errors import InputError

FORMAT = 3
"""Of the state; a change that earlier states cannot be read with counts it up."""


class TrainIterator(grain.DatasetIterator):
    """Batches, and a state that says what it is a state of.

    Args:
      parent: yields the batches.
      num_workers: processes that read, each of which has a place of its own in the data.
      fingerprints: source -> what its documents are known by.
    """

    def __init__(
        self, parent: grain.DatasetIterator, num_workers: int, fingerprints: Mapping[str, Mapping[str, Any]]
    ) -> None:
        super().__init__(parent)
        self._num_workers = num_workers
        self.fingerprints = fingerprints

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"format": FORMAT, "num_workers": self._num_workers, "batches": self._parent.get_state()}

    def set_state(self, state: Any) -> None:
        """Goes back to where the iterator was when it gave this state.

        Raises:
          InputError: it is no such state, or of another format or number of workers; or a document that waited for its
            row is no longer what it was.
        """
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise InputError(
                "The place in the data is damaged, or was saved by an earlier version of this package: go on with that "
                "version, or begin another run_dir from the parameters of this run (init.from_run)."
            )
        if state.get("num_workers") != self._num_workers:
            raise InputError(
                f"data.num_workers={self._num_workers} is not possible: this run was saved with "
                f"{state.get('num_workers')!r:.20}, and goes on with as many, for each has its own place in the data."
            )
        try:
            self._parent.set_state(state["batches"])
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"The place in the data is damaged ({type(error).__name__}: {error}): go on from an earlier "
                "checkpoint, or begin another run_dir from the parameters of this run (init.from_run)."
            ) from error


def read_counters(iterator: grain.DatasetIterator) -> dict[str, dict[str, int]]:
    """What a training iterator has done with the documents of each source: source -> `tally.COUNTERS`.

    It counts up to the last batch taken, from the start of the run: the counts are part of the iterator's state.
    """
    totals: dict[str, dict[str, int]] = {}

    def add(state: Any) -> None:
        if isinstance(state, list):
            for item in state:
                add(item)
        elif isinstance(state, dict):
            for source, counters in state.get("tally", {}).get("counters", {}).items():
                total = totals.setdefault(source, dict.fromkeys(counters, 0))
                for name, count in counters.items():
                    total[name] += count
            add(list(state.values()))

    add(iterator.get_state())
    return dict(sorted(totals.items()))
