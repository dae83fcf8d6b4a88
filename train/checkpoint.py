"""Checkpoints of a run, written while training goes on.

RUN_DIR/checkpoints/STEP holds three items:
- model: the nnx.State of the model, parameters and buffers together, as nested dictionaries;
- training: step, optimizer state and random key;
- data: where each process's data iterator stands, after exactly the batches of the first STEP steps.

A checkpoint is written under another name and renamed when it is whole, so one that was interrupted is never seen.
"""

from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from flax import nnx

from gemma4_jax.errors import InputError
from gemma4_jax.hf.names import flatten_paths
from gemma4_jax.hf.parameters import stored_arrays
from gemma4_jax.layers import Buffer
from gemma4_jax.train.state import TrainState

MAX_CHUNK_BYTES = 2**28
"""The most of an array that is written, compressed and read in one piece, so that an export needs no more memory."""


def latest_step(run_dir: Path) -> int | None:
    """Step of the latest checkpoint in a run directory; None if there is none."""
    folder = run_dir / "checkpoints"
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.is_dir() else None


class Checkpoints:
    """The checkpoints in a run directory.

    Args:
      run_dir: absolute path.
      keep: how many of the latest to keep.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(run_dir / "checkpoints", options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Takes a copy of everything and returns; files are written meanwhile.

        Args:
          step: steps taken.
          state: after that step. It may be donated as soon as this returns.
          iterator: which has given exactly the batches of these steps.
        """
        items = ocp.args.Composite(
            model=_in_chunks(_model_dict(state)),
            training=_in_chunks(_training_dict(state)),
            data=grain.checkpoint.CheckpointSave(iterator),
        )
        self._manager.save(step, args=items)

    def restore(self, step: int, abstract: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """Reads one checkpoint, each array straight to its shards on this run's mesh, whatever mesh it was saved on.

        Args:
          step: of the checkpoint.
          abstract: the state to fill, from `state.abstract_state`.
          iterator: set to where it stood.
        Raises:
          InputError: the checkpoint is not of this model, or of another number of processes.
        """
        self._check_model(step, abstract)
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore(_model_dict(abstract)),
            training=ocp.args.StandardRestore(_training_dict(abstract)),
            data=grain.checkpoint.CheckpointRestore(iterator),
        )
        try:
            restored = self._manager.restore(step, args=items)
        except InputError:  # the data is not what it was: nothing is wrong with the checkpoint
            raise
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"checkpoint {self._manager.directory / str(step)} cannot be restored: {reason}; delete that folder to "
                "go on from the one before it, or give another run_dir."
            ) from error
        model = nnx.merge_state(abstract.params, abstract.buffers)
        nnx.replace_by_pure_dict(model, restored.model)
        params, buffers = nnx.split_state(model, nnx.Param, Buffer)
        return TrainState(params=params, buffers=buffers, **restored.training)

    def _check_model(self, step: int, abstract: TrainState) -> None:
        """Names all that differs, before Orbax meets the first of it with reads under way that it would abandon."""
        folder = Path(self._manager.directory) / str(step)
        stored = {path: tuple(array.shape) for path, array in stored_arrays(folder / "model").items()}
        wanted = {path: array.shape for path, array in flatten_paths(_model_dict(abstract)).items()}
        differing = sorted(path for path in stored | wanted if stored.get(path) != wanted.get(path))
        if differing:
            named = ", ".join(f"{path} {stored.get(path)} and not {wanted.get(path)}" for path in differing[:5])
            more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise InputError(
                f"checkpoint {folder} cannot be restored: it is of another model, with {named}{more}; give another "
                "run_dir."
            )

    def close(self) -> None:
        """Waits until the last save is whole."""
        self._manager.close()


def _in_chunks(item: dict[str, Any]) -> ocp.args.StandardSave:
    return ocp.args.StandardSave(item, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES), item))


def _model_dict(state: TrainState) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.merge_state(state.params, state.buffers))


def _training_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
