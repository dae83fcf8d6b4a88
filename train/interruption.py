"""How a run answers SIGTERM, by which clusters take machines back, and Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Interruption:
    """Watches for the two signals. A context manager.

    The first one asks the run to save and to leave, which it does after the step or the batch of evaluation that it is
    at. Where it has nothing to save, and at the second one, the process ends at once. A thread of its own sees to it:
    Python runs signal handlers between two bytecodes of the main thread, which during a compilation may be minutes
    apart, and to unwind the stack while XLA compiles ends in a crash. To end anywhere is safe, for whatever a run
    writes is whole at any moment.

    With many processes jax.distributed has its own handler, and agrees with the others on the step to stop after.

    Args:
      say: prints a line.
      undo: what is called before the process ends at once.

    Attributes:
      signal: the first that came; None before.
      saved_step: of the latest checkpoint that is whole; None if there is none.
      has_unsaved: whether steps were taken after it.
    """

    def __init__(self, say: Callable[[str], None], *undo: Callable[[], None]) -> None:
        self.signal: signal.Signals | None = None
        self.saved_step: int | None = None
        self.has_unsaved = False
        self._say, self._undo = say, undo
        self._is_active = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interruption":
        if not self._is_active:
            return self
        read, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(read,), daemon=True)
        self._thread.start()
        # The pipe is told of signals that have a handler. One that is ignored, as under nohup, stays so.
        self._previous = {}
        for number in _NAMES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_active:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._wakeup)
        self._thread.join()

    def is_due(self, step: int) -> bool:
        """Whether the run is to stop after this step; every process asks at every step."""
        return self.signal is not None or (
            jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
        )

    def leave(self) -> None:
        """Ends the run, whose last step has been saved.

        Raises:
          SystemExit: 128 and the number of the signal.
        """
        number = self.signal or signal.SIGTERM  # jax.distributed tells of no other
        self._say(f"{_NAMES[number]}: saved step {self.saved_step}; the same command goes on from there")
        raise SystemExit(128 + number)

    def _watch(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while numbers := pipe.read(1):
                if numbers[0] in _NAMES:
                    self._answer(signal.Signals(numbers[0]))

    def _answer(self, number: signal.Signals) -> None:
        if self.signal is None and self.has_unsaved:
            self.signal = number
            with contextlib.suppress(OSError):  # nobody may be left to read it
                self._say(f"{_NAMES[number]}: saving the last step; once more ends the run at once")
            return
        goes_on = "begins anew" if self.saved_step is None else f"goes on from step {self.saved_step}"
        try:
            self._say(f"{_NAMES[number]}: ended at once; the same command {goes_on}")
            for undo in self._undo:
                undo()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(128 + number)
