"""What a run shows of itself: live bars on a terminal, plain lines everywhere else."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text


class _Rest(ProgressColumn):
    """Time left, from the step time of the latest record."""

    def render(self, task: Task) -> Text:
        return Text(f"eta {task.fields['eta']}", style="progress.remaining")


class Terminal:
    """Tells what a run is doing, from its first second on. A context manager.

    Args:
      is_shown: False on all but one of the processes of a run.
    """

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._live: Live | None = None
        if is_shown and sys.stdout.isatty():
            self._stages = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), _Rest())
            self._live = Live(Group(self._stages, self._bar))

    def __enter__(self) -> "Terminal":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the terminal as it was found; what is said later is said all the same."""
        if self._live is not None:
            self._live.stop()

    @contextlib.contextmanager
    def stage(self, doing: str, done: str = "") -> Iterator[None]:
        """Shows that something is going on, and for how long; "..." after a line says that it has only begun.

        Args:
          doing: what is shown meanwhile.
          done: what is said with the time it took when it has succeeded; nothing by default.
        """
        began = time.perf_counter()
        if self._live is None:
            self.say(f"{doing} ...")
            yield
        else:
            task = self._stages.add_task(doing, total=None)
            try:
                yield
            finally:
                self._stages.remove_task(task)
        if done:
            self.say(f"{done} in {time.perf_counter() - began:.1f} s")

    def show(self, record: dict[str, Any], num_steps: int) -> None:
        """Shows a training record of a run of so many steps."""
        eta = _clock((num_steps - record["step"]) * record["seconds"] / record["steps"])
        numbers = (
            f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{record['images_per_second']:,.1f} images/s"
        )
        if self._live is None:
            self.say(f"step {record['step']}/{num_steps}  {numbers}  eta {eta}")
            return
        if not self._bar.tasks:
            self._bar.add_task("", total=num_steps, eta="")
        self._bar.update(self._bar.task_ids[0], completed=record["step"], description=numbers, eta=eta)

    def say(self, text: str) -> None:
        """Prints a line, above what is live."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        elif self._is_shown:
            print(text, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
