"""Sources to folders of prepared data, shard by shard; `data.prepared` says what is in one.

A shard is a pure function of the plan, and there whole or not. So an interrupted preparation goes on with the shards
that are not done, on any number of machines, and two that make the same one make the same bytes.
"""

import json
import math
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.data.documents import Documents, holds_back, makes_up, open_documents
from gemma4_jax.data.example import SizedExample
from gemma4_jax.data.mixture import Examples
from gemma4_jax.data.pipeline import make_encoder
from gemma4_jax.data.prepared import (
    FORMAT,
    MANIFEST,
    PLAN,
    Shard,
    array_record,
    encoding_of,
)
from gemma4_jax.data.shards import PARTS, ShardWriter, Task
from gemma4_jax.data.tally import COUNTERS, MAX_NAMED, MIN_JUDGED
from gemma4_jax.data.workers import end_with_parent
from gemma4_jax.errors import InputError
from gemma4_jax.fields import require
from gemma4_jax.files import write_atomically
from gemma4_jax.run_config import RunConfig, SourceConfig
from gemma4_jax.tokenizer import Tokenizer

MIN_SHARDS, SHARD_BYTES, MIN_SHARD_DOCUMENTS = 16, 2**29, 64
"""Where nobody says how many: at least so many shards, for many workers, none larger than this, none with fewer
documents."""

SAMPLE = 64
"""Documents from which the bytes of all are estimated."""

PROGRESS_SECONDS = 10.0


def prepare(
    config: RunConfig,
    out: Path,
    *,
    sources: Sequence[str] = (),
    num_shards: int = 0,
    num_workers: int = 1,
    part: tuple[int, int] = (0, 1),
    report: Callable[[str], None] = print,
) -> dict[str, bool]:
    """Prepares sources of a run, each in a folder of its own; what is done already stays.

    Args:
      config: of the run, resolved; model, tokenizer and data are read.
      out: OUT/SOURCE is the folder of a source.
      sources: names; of none, all that are drawn from.
      num_shards: of each side of a source, at most one for each document; 0 goes by what they hold.
      num_workers: processes.
      part: (i, n) makes every n-th shard from the i-th on.
      report: is told how it goes.
    Returns:
      Source -> whether all of it is prepared: its manifest is written.
    Raises:
      InputError: the config or a source is not acceptable, too many of its documents are left out, or the folder holds
        something else, or has no room.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    encode = make_encoder(config, tokenizer)
    array_record()  # or it is told now that it is not installed
    for name in sources:
        require(name in config.data.sources, "--source", name, f"one of {', '.join(config.data.sources)}")
    chosen = {name: config.data.sources[name] for name in sources} or config.data.mixture
    names = [name for name, source in chosen.items() if not makes_up(source)]
    for name in chosen.keys() - set(names):
        report(f"{name} makes its documents up as they are read: there is nothing to prepare")
    if not names:
        return {}
    by_source: dict[str, list[Task]] = {}
    plans: dict[str, dict[str, Any]] = {}
    examples: dict[tuple[str, str], Examples] = {}
    num_bytes: dict[tuple[str, str], float] = {}
    for name in names:
        require(Path(name).name == name != "..", "data.sources", name, "a name that a folder can have")
        folder = out / name
        sides = _open_sides(chosen[name])
        for side, documents in sides.items():
            examples[name, side] = Examples(name, documents, encode)
            num_bytes[name, side] = _bytes_per_document(examples[name, side])
        plan = _plan(chosen[name], sides, encoding_of(encode))
        shards = {side: _num_shards(num_shards, part[1], len(sides[side]), num_bytes[name, side]) for side in sides}
        plans[name] = _agree(folder, plan | {"num_shards": shards}, is_given=num_shards > 0)
        by_source[name] = [
            task for side in sides for task in _tasks(name, side, folder / side, plans[name], len(sides[side]))
        ]
    tasks = [task for of_source in by_source.values() for task in of_source]
    _check_room(out, tasks, num_bytes)
    pending = [task for task in tasks[part[0] :: part[1]] if task.done() is None]
    _run(ShardWriter(examples, config.data.max_left_out), pending, num_workers, report)
    return {name: _finish(out / name, plans[name], by_source[name], config.data.max_left_out) for name in names}


def _open_sides(config: SourceConfig) -> dict[str, Documents]:
    """The documents on each side of the split, as training and evaluation read them."""
    sides = {"train": open_documents(config)} if config.weight else {}
    if holds_back(config) or not sides:
        sides["held_out"] = open_documents(config, split="held_out")
    return sides


def _plan(source: SourceConfig, sides: Mapping[str, Documents], encoding: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what is made, but for the number of shards: a JSON object."""
    plan = {
        "format": FORMAT,
        "encoding": encoding,
        "source": {name: getattr(source, name) for name in ("kind", "task", "columns", "options", "held_out")},
        "documents": {side: len(documents) for side, documents in sides.items()},
        "data": {side: documents.fingerprint() for side, documents in sides.items()},
    }
    return json.loads(json.dumps(plan, default=repr))


def _bytes_per_document(examples: Examples) -> float:
    """An estimate, of evenly spaced documents: of their images and sounds only the headers are read."""
    indices = np.unique(np.linspace(0, len(examples) - 1, SAMPLE, dtype=int))
    found = [example for i in indices.tolist() if isinstance(example := examples[i], SizedExample)]
    texts = sum(2 * len(example.text.tokens) for example in found)
    images = sum(image.num_patches * 3 * image.patch_size**2 for example in found for image in example.images)
    sounds = sum(sound.num_frames * 4 * sound.mel_bins for example in found for sound in example.sounds)
    return (texts + images + sounds) / max(1, len(found))


def _num_shards(given: int, num_parts: int, num_documents: int, num_bytes: float) -> int:
    if given:
        return min(given, num_documents)
    wanted = max(MIN_SHARDS, num_parts, math.ceil(num_documents * num_bytes / SHARD_BYTES))
    return min(wanted, math.ceil(num_documents / MIN_SHARD_DOCUMENTS))


def _agree(folder: Path, plan: dict[str, Any], *, is_given: bool) -> dict[str, Any]:
    """Writes the plan, where there is none; of one that is there the number of shards is taken, where none is given.

    Raises:
      InputError: it is another.
    """
    path = folder / PLAN
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            others = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
            if others and PLAN not in others:  # which another process may have written by now
                raise InputError(f"{folder} holds something else: give another --out.")
            write_atomically(path, json.dumps(plan, indent=1) + "\n")
        found = json.loads(path.read_bytes())
        if not is_given:
            plan = plan | {"num_shards": found["num_shards"]}
        for name, value in plan.items():
            if found.get(name) != value:
                was, now = (f"{json.dumps(one):.100}" for one in (found.get(name), value))
                other = f"{folder} was begun with another {name}, {was} and not {now}"
                raise InputError(f"{other}: give another --out, or delete it.")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be written: {error.strerror}.") from error
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): give another --out, or delete {folder}.") from error
    return plan


def _tasks(source: str, side: str, folder: Path, plan: Mapping[str, Any], num_documents: int) -> list[Task]:
    count = plan["num_shards"][side]
    stops = [num_documents * (i + 1) // count for i in range(count)]
    bounds = zip([0, *stops], stops, strict=False)
    return [Task(source, side, Shard(folder, i, count), *bound) for i, bound in enumerate(bounds)]


def _check_room(out: Path, tasks: Sequence[Task], num_bytes: Mapping[tuple[str, str], float]) -> None:
    needed = sum((t.stop - t.start) * num_bytes[t.source, t.side] for t in tasks if t.done() is None)
    free = shutil.disk_usage(out).free
    if needed > free:
        gb = f"about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        raise InputError(f"What is prepared in {out} takes {gb}: make room, or give --out on another disk.")


class _Progress:
    """Tells now and then how many documents are done.

    Args:
      total: documents to do.
      report: is told.
    """

    def __init__(self, total: int, report: Callable[[str], None]) -> None:
        self._total, self._report = total, report
        self._start = self._told = time.monotonic()
        self._num_done = 0

    def add(self) -> None:
        """One more is done."""
        self.show(self._num_done + 1)

    def show(self, num_done: int) -> None:
        """So many are done."""
        self._num_done, now = num_done, time.monotonic()
        if num_done and (now - self._told >= PROGRESS_SECONDS or num_done == self._total):
            self._told = now
            rate = num_done / max(now - self._start, 1e-3)
            left = (self._total - num_done) / rate
            time_left = f", {left / 60:,.1f} min left" if left else ""
            self._report(f"{num_done:,} of {self._total:,} documents, {rate:,.1f} a second{time_left}")


def _run(write: ShardWriter, tasks: Sequence[Task], num_workers: int, report: Callable[[str], None]) -> None:
    """Does all tasks, in this process or in several others."""
    progress = _Progress(sum(task.stop - task.start for task in tasks), report)
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        for task in tasks:
            write(task, progress.add)
        return
    context = multiprocessing.get_context("spawn")  # forked threads of jax and Grain would wait for locks forever
    shared = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(num_workers, context, _begin, (write, *shared)) as pool:
        num_done, stop = shared
        left = {pool.submit(_do, task) for task in tasks}
        try:
            while left:
                done, left = wait(left, PROGRESS_SECONDS / 10, FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress.show(num_done.value)
        except BrokenProcessPool as error:
            raise InputError(
                "A process that prepared documents was ended from outside, as happens where memory is short: run the "
                "same command again, with fewer --workers; what is done stays."
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


class _StoppedError(Exception):
    """The process that waits for this one has met an error."""


_OF_PROCESS: list[Any] = []
"""What `_begin` was given, in a process of the pool."""


def _begin(write: ShardWriter, num_done: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all: the process that waits answers
    end_with_parent()
    _OF_PROCESS[:] = write, num_done, stop


def _do(task: Task) -> None:
    write, num_done, stop = _OF_PROCESS

    def count() -> None:
        if stop.is_set():
            raise _StoppedError
        with num_done.get_lock():
            num_done.value += 1

    write(task, count)


def _finish(folder: Path, plan: Mapping[str, Any], tasks: Sequence[Task], max_left_out: float) -> bool:
    """Writes the manifest of a source, if all of its shards are done.

    Raises:
      InputError: too many of its documents are left out.
    """
    shards = [known for task in tasks if (known := task.done()) is not None]
    if len(shards) < len(tasks):
        return False
    counters = {name: sum(shard["counters"][name] for shard in shards) for name in COUNTERS}
    if counters["read"] >= MIN_JUDGED and counters["unreadable"] > max_left_out * counters["read"]:
        share = f"{counters['unreadable']} of {counters['read']} documents of {tasks[0].source!r} are unreadable"
        raise InputError(f"{share}, more than data.max_left_out={max_left_out}: mend the source, or allow more.")
    left_out = [reason for shard in shards for reason in shard["left_out"]][:MAX_NAMED]
    manifest = {**plan, "counters": counters, "left_out": left_out, "shards": shards}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for path in folder.glob(f"*/{PARTS}*"):  # of processes that were killed
        shutil.rmtree(path, ignore_errors=True)
    return True
