"""What a run measures while it goes on: metrics.jsonl always, TensorBoard if asked.

metrics.jsonl holds one JSON object per line: at every logged step one of training, and at every evaluation one whose
fields begin with the evaluator's name. A resumed run drops the lines after the step it goes on from, so no step is told
twice.
"""

import collections
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma4_jax.errors import InputError
from gemma4_jax.files import write_atomically
from gemma4_jax.train.step import StepMetrics

MAX_UNFINISHED_STEPS = 2
"""Steps handed to the devices and not yet finished, at most: the next waits ready while one is worked on."""


MEASURED = ("steps", "tokens", "images", "padding_share", "seconds", "step_seconds", "data_wait_seconds")
"""Fields of a training record that are numbers even where the loss is none."""


class Meter:
    """Times steps and gathers their metrics without holding up the devices.

    Steps are handed over one ahead, so a step's metrics are read when the next is already at work. A step is counted
    from the end of the one before it to its own end.

    Args:
      every_steps: steps to a record; the last step completes one too.
      last_step: of the run.
      slots: tokens that a batch has room for.
    """

    def __init__(self, every_steps: int, last_step: int, slots: int) -> None:
        self._every_steps = every_steps
        self._last_step = last_step
        self._slots = slots
        # Any: the type of jax arrays does not declare is_ready.
        self._unfinished: collections.deque[tuple[int, Any, float]] = collections.deque()
        self._finished: list[tuple[int, StepMetrics, float, float]] = []
        self._mark = time.perf_counter()

    def is_idle(self) -> bool:
        """Whether the devices have finished every step that they were handed."""
        return not self._unfinished or self._unfinished[-1][1].is_sane.is_ready()

    def add(self, step: int, metrics: StepMetrics, data_wait: float) -> list[dict[str, Any]]:
        """Notes a step that was handed to the devices, and waits until few enough are unfinished.

        Args:
          step: its number, from 1.
          metrics: on the devices.
          data_wait: seconds that the devices stood idle for want of its batch.
        Returns:
          Records that are complete now.
        """
        self._unfinished.append((step, metrics, data_wait))
        return self._finish(until=MAX_UNFINISHED_STEPS - 1)

    def drain(self) -> list[dict[str, Any]]:
        """Waits for every step; returns the records that are complete now. Time until `restart` is not counted."""
        return self._finish(until=0)

    def flush(self) -> list[dict[str, Any]]:
        """As `drain`, and with a record of the steps since the last one: nothing more will come."""
        records = self.drain()
        return [*records, self._record()] if self._finished else records

    def restart(self) -> None:
        """Counts time from now on, after something that was not training."""
        self._mark = time.perf_counter()

    def _finish(self, until: int) -> list[dict[str, Any]]:
        records = []
        while len(self._unfinished) > until:
            step, metrics, data_wait = self._unfinished.popleft()
            metrics = jax.device_get(metrics)
            now = time.perf_counter()
            self._finished.append((step, metrics, now - self._mark, data_wait))
            self._mark = now
            if step % self._every_steps == 0 or step == self._last_step or not metrics.is_sane:
                records.append(self._record())
        return records

    def _record(self) -> dict[str, Any]:
        steps, metrics, seconds, waits = zip(*self._finished, strict=True)
        self._finished = []
        tokens = sum(int(m.tokens) for m in metrics)
        images = sum(int(m.images) for m in metrics)
        record: dict[str, Any] = {"step": steps[-1], "steps": len(steps)}
        for name in metrics[0].means:
            # Means of the steps' own; an array, such as the load of each expert, is for people to look at.
            mean = np.mean([m.means[name] for m in metrics], axis=0, dtype=np.float64)
            record[name] = float(mean) if mean.ndim == 0 else mean.round(5).tolist()
        for name in ("grad_norm", "param_norm"):
            record[name] = float(np.mean([getattr(m, name) for m in metrics]))
        record |= {
            "learning_rate": float(metrics[-1].learning_rate),
            "tokens": tokens,
            "images": images,
            "padding_share": 1 - tokens / (len(metrics) * self._slots),
            "seconds": sum(seconds),
            "step_seconds": statistics.median(seconds),
            "data_wait_seconds": sum(waits),
            "tokens_per_second": tokens / sum(seconds),
            "images_per_second": images / sum(seconds),
        }
        record["is_sane"] = all(bool(m.is_sane) for m in metrics)
        return record


class MetricsLog:
    """Writes records to metrics.jsonl and to TensorBoard.

    Args:
      run_dir: of the run.
      step: that the run goes on from; later records of an earlier start are dropped.
      tensorboard: whether to write event files too.
    """

    def __init__(self, run_dir: Path, step: int, *, tensorboard: bool) -> None:
        path = run_dir / "metrics.jsonl"
        kept = [record for record in read_records(path) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any], *, group: str = "train") -> None:
        """Adds one record, at once; `group` is the evaluator that it is of, or "train"."""
        finite = {name: None if _is_not_a_number(value) else value for name, value in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._writer is None:
            return
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "steps"):
                self._writer.add_scalar(f"{group}/{name.removeprefix(f'{group}_')}", value, record["step"])
        if finite.get("expert_load"):
            load = np.array(record["expert_load"])
            self._writer.add_scalar("train/expert_load_max", float(load.max() * load.shape[-1]), record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _is_not_a_number(value: Any) -> bool:
    return isinstance(value, float | list) and not np.isfinite(value).all()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off by a crash is left out.

    Raises:
      InputError: it cannot be read, or another line is no record of a run.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    # What follows the last line break is a line that was never finished.
    return [_record(path, number, line) for number, line in enumerate(lines[:-1], 1)]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        fault = "it is not JSON"
    else:
        fault = _fault(record)
    if fault:
        raise InputError(
            f"{path} line {number} is not a record of a run ({fault}): mend it, or remove the line or the file, with "
            "which curves are lost and nothing else."
        )
    return record


def _fault(record: Any) -> str:
    """What keeps this from being a record that `MetricsLog` wrote; nothing if it is one."""
    if not isinstance(record, dict):
        return "it is not an object"
    if type(record.get("step")) is not int:
        return "step is not a whole number"
    for name, value in record.items():
        is_right = value is None or (np.ndim(value) == 2 if name == "expert_load" else _is_number(value))
        if not is_right:
            return f"{name} is {value!r:.40}"
    if "loss" in record and (missing := [name for name in MEASURED if not _is_number(record.get(name))]):
        return f"{missing[0]} is missing"
    return ""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
