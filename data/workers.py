"""Worker processes that end when the training process does, and at no other time.

A terminal sends Ctrl-C, and a cluster SIGTERM, to every process of a run. Only the training process answers: it has
steps to save, and needs the workers until it has.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence

import grain
from absl import flags

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_MUTES_TRACKER = "ignore:resource_tracker:UserWarning"
"""Python's resource tracker, a process that outlives all others of a run, removes the shared memory that they leave. It
warns when there is something to remove, and here there is whenever a run is stopped."""


def read_in_workers(parts: Sequence[grain.IterDataset]) -> grain.IterDataset:
    """Tuples of what several datasets yield, each of which is read by a process of its own."""
    if not flags.FLAGS.is_parsed():  # Grain's worker processes read flags of their own, also where nothing has any
        flags.FLAGS.mark_as_parsed()
    if _MUTES_TRACKER not in sys.warnoptions:  # which are handed to the tracker when it is started
        sys.warnoptions.append(_MUTES_TRACKER)
    options = grain.MultiprocessingOptions(num_workers=1)
    return grain.experimental.ZipIterDataset([part.mp_prefetch(options, end_with_parent) for part in parts])


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


def end_with_parent(*_: int) -> None:
    """Lets this worker process end as soon as the one that started it has, however that ended."""
    threading.Thread(target=_wait_for_end_of_parent, daemon=True).start()


def _wait_for_end_of_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
