"""Checkpoints of a run, written while training goes on.

RUN_DIR/checkpoints/STEP holds three items:
- model: the trained parameters, as nested dictionaries;
- training: step and optimizer state;
- data: where the data iterator of each process stands, after exactly the batches of the first STEP steps. Together
  they say where the run stands, and any number of processes goes on from them.

RUN_DIR/frozen holds the item model of what never changes, frozen parameters and buffers: it is written once, before the
first checkpoint, and only where there is any.

A checkpoint is written under another name and renamed when it is whole, so one that was interrupted is never seen. The
last that goes into it are checksums of its files.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from flax import nnx

from gemma4_jax.checkpoints.integrity import FROZEN, checkpoint_steps, newest_intact, write_checksums
from gemma4_jax.checkpoints.parameters import CheckpointParameters, flatten_paths, stored_arrays
from gemma4_jax.data.iterator import TrainIterator, join_states
from gemma4_jax.errors import InputError
from gemma4_jax.processes import agree, is_first, led_by_first
from gemma4_jax.train.state import TrainState

MAX_CHUNK_BYTES = 2**28
"""The most of an array that is written, compressed and read in one piece, so that an export needs no more memory."""


class Checkpoints:
    """The checkpoints in a run directory.

    Damaged ones that are newer than the newest intact one are set aside as STEP.damaged, with a warning.

    Args of the constructor:
      run_dir: absolute path.
      keep: how many of the latest to keep.
      checksums: whether a checkpoint carries checksums of its files, or only their sizes.

    Raises:
      InputError: there are checkpoints, and none of them is intact.
    """

    def __init__(self, run_dir: Path, keep: int, *, checksums: bool = True) -> None:
        self._folder, self._checksums = run_dir / "checkpoints", checksums
        self._step_to_save: int | None = None
        logging.getLogger("absl").addFilter(_is_no_traceback_of_orbax)
        self._frozen = run_dir / FROZEN
        self.latest_step: int | None = agree(lambda: _set_damaged_aside(run_dir))
        self._has_frozen = self.latest_step is not None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # In the first process, when all have written everything, and just before the folder gets its name.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Takes a copy of everything and returns; files are written meanwhile.

        Args:
          step: steps taken.
          state: after that step. It may be donated as soon as this returns.
          iterator: which has given exactly the batches of these steps.
        Raises:
          InputError: this checkpoint, or the one before it, cannot be written; those that were whole still are.
        """
        self.wait()  # the step to save is that of one save at a time
        if not self._has_frozen:
            self._save_frozen(nnx.to_pure_dict(state.frozen))
            self._has_frozen = True
        self._step_to_save = step
        items = ocp.args.Composite(
            model=_in_chunks(nnx.to_pure_dict(state.trained)),
            training=_in_chunks(_training_dict(state)),
            data=grain.checkpoint.CheckpointSave(iterator),
        )
        with self._as_one_sentence():
            self._manager.save(step, args=items)

    def wait(self) -> None:
        """Returns when the last save is whole.

        Raises:
          InputError: it failed.
        """
        with self._as_one_sentence():
            self._manager.wait_until_finished()

    def restore(self, step: int, abstract: TrainState, iterator: TrainIterator) -> TrainState:
        """Reads one checkpoint, each array straight to its shards on this run's mesh, whatever mesh it was saved on.

        Args:
          step: of the checkpoint.
          abstract: the state to fill, from `state.abstract_state`.
          iterator: set to where it stood.
        Raises:
          InputError: the checkpoint is not of this model, or its place in the data is none of this run.
        """
        self._check_model(step, abstract)
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore(nnx.to_pure_dict(abstract.trained)),
            training=ocp.args.StandardRestore(_training_dict(abstract)),
        )
        frozen = nnx.to_pure_dict(abstract.frozen)
        try:
            restored = self._manager.restore(step, args=items)
            iterator.set_state(agree(lambda: _place_in_data(Path(self._manager.directory) / str(step) / "data")))
            if jax.tree.leaves(frozen):
                with ocp.StandardCheckpointer() as checkpointer:
                    frozen = checkpointer.restore(self._frozen / "model", frozen)
        except InputError:  # the data is not what it was: nothing is wrong with the checkpoint
            raise
        except Exception as error:  # the library's for files that it did not expect
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"checkpoint {self._manager.directory / str(step)} cannot be restored: {reason}; delete that folder to "
                "go on from the one before it, or give another run_dir."
            ) from error
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state.trained, restored.model)
        nnx.replace_by_pure_dict(state.frozen, frozen)
        return dataclasses.replace(state, **restored.training)

    def _check_model(self, step: int, abstract: TrainState) -> None:
        """Names all that differs, before Orbax meets the first of it with reads under way that it would abandon."""
        folder = Path(self._manager.directory) / str(step)
        if "rng" in stored_arrays(folder / "training"):
            raise InputError(
                f"checkpoint {folder} is of an earlier version of this package, which kept a random key in it: begin "
                f"another run from its parameters, with init.from_run={str(self._folder.parent)!r}."
            )
        stored = dict(CheckpointParameters(self._folder.parent, step).shapes)
        wanted = {path: array.shape for path, array in flatten_paths(nnx.to_pure_dict(abstract.model)).items()}
        differing = sorted(path for path in stored | wanted if stored.get(path) != wanted.get(path))
        if differing:
            named = ", ".join(f"{path} {stored.get(path)} and not {wanted.get(path)}" for path in differing[:5])
            more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise InputError(
                f"checkpoint {folder} cannot be restored: it is of another model, with {named}{more}; give another "
                "run_dir."
            )

    def close(self) -> None:
        """Waits until the last save is whole, and ends the threads that write.

        Raises:
          InputError: it failed.
        """
        with self._as_one_sentence():
            self._manager.close()

    def _save_frozen(self, frozen: dict[str, Any]) -> None:
        """Writes what no step changes, in place of what a start that came to no checkpoint may have left."""
        in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES), frozen)
        with self._as_one_sentence(self._frozen):
            with led_by_first():
                if is_first():
                    shutil.rmtree(self._frozen, ignore_errors=True)
            if not jax.tree.leaves(frozen):
                return
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self._frozen / "model", frozen, save_args=in_chunks)
            with led_by_first():
                if is_first():
                    write_checksums(self._frozen, sizes_only=not self._checksums)

    def _write_checksums(self) -> None:
        (folder,) = self._folder.glob(f"{self._step_to_save}{ocp.utils.TMP_DIR_SUFFIX}*")
        write_checksums(folder, sizes_only=not self._checksums)

    @contextlib.contextmanager
    def _as_one_sentence(self, folder: Path | None = None) -> Iterator[None]:
        """Around what raises when the save of a folder fails, often a while after it began; None is the last step's."""
        try:
            yield
        except Exception as error:  # of the library, which lets everything through
            steps = checkpoint_steps(self._folder.parent)
            place = f"step {steps[-1]}, the last checkpoint that is whole" if steps else "the beginning"
            folder = folder or self._folder / str(self._step_to_save)
            raise InputError(
                f"checkpoint {folder} could not be saved ({_reason(error)}): mend that and give the command again, "
                f"which goes on from {place}."
            ) from error


def _place_in_data(folder: Path) -> Any:
    """What the iterators of all processes that saved a checkpoint said, as one."""
    return join_states(json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("process_*-of-*.json")))


def _set_damaged_aside(run_dir: Path) -> int | None:
    """Renames what is newer than the newest intact checkpoint, so that its step can be saved again; tells that one."""
    steps = checkpoint_steps(run_dir)
    if not steps:
        return None
    newest = newest_intact(run_dir)
    for step in steps:
        if step > newest:
            folder = run_dir / "checkpoints" / str(step)
            aside = folder.with_name(f"{step}.damaged")
            for number in itertools.count(2):
                if not aside.exists():
                    break
                aside = folder.with_name(f"{step}.damaged.{number}")
            folder.rename(aside)
    return newest


def _reason(error: Exception) -> str:
    """Why something could not be written: the system's words where they are in an error of the library."""
    text = " ".join(str(error).split())
    known = [words for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if (words := os.strerror(number)) in text]
    return (known[0] if known else text[:300]).lower()


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """What Orbax logs of an exception in its threads is raised as well, and is told once, in a sentence."""
    return not (record.exc_info and "orbax" in record.pathname)


def _in_chunks(item: dict[str, Any]) -> ocp.args.StandardSave:
    return ocp.args.StandardSave(item, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES), item))


def _training_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}
