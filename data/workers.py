"""Worker processes that end when the training process does, and at no other time.

A terminal sends Ctrl-C, and a cluster SIGTERM, to every process of a run. Only the training process answers: it has
steps to save, and needs the workers until it has.
"""

import multiprocessing
import os
import signal
import sys
import threading

import grain
from absl import flags

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_MUTES_TRACKER = "ignore:resource_tracker:UserWarning"
"""Python's resource tracker, a process that outlives all others of a run, removes the shared memory that they leave. It
warns when there is something to remove, and here there is whenever a run is stopped."""


def read_in_workers(batches: grain.IterDataset, num_workers: int) -> grain.IterDataset:
    """The same batches, read and packed by processes, each of which reads every n-th document.

    Args:
      batches: of one training process.
      num_workers: processes, at least 1.
    """
    if not flags.FLAGS.is_parsed():  # Grain's worker processes read flags of their own, also where nothing has any
        flags.FLAGS.mark_as_parsed()
    if _MUTES_TRACKER not in sys.warnoptions:  # which are handed to the tracker when it is started
        sys.warnoptions.append(_MUTES_TRACKER)
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), _end_with_parent)


class Prefetch(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain's prefetching thread, started so that neither it nor the processes that it starts see those signals.

    A mask is inherited by threads and processes from their first moment on, long before a worker could set a handler.
    """

    def start_prefetch(self) -> None:
        """Starts the thread, if it is not running."""
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            super().start_prefetch()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _end_with_parent(worker: int, num_workers: int) -> None:
    """Lets this worker process end as soon as the one that started it has, however that ended."""
    threading.Thread(target=_wait_for_end_of_parent, daemon=True).start()


def _wait_for_end_of_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
