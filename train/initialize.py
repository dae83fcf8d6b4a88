"""What a run begins from, where that is not random: a Hugging Face checkpoint, or another run."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from gemma4_jax.config import Gemma4Config
from gemma4_jax.errors import InputError
from gemma4_jax.hf.load import Checkpoint, another_model, differing_fields, load_state, write_carried
from gemma4_jax.hf.names import flatten_paths
from gemma4_jax.hf.parameters import CheckpointParameters
from gemma4_jax.hf.save import CARRIED
from gemma4_jax.train.state import TrainState


def check_source(init: Any, model_config: Gemma4Config) -> None:
    """Checks, before anything is written, that a run can begin from what its config names.

    Args:
      init: the section `init` of the run config.
      model_config: the architecture of the run.
    Raises:
      InputError: it is not there, is damaged, or is another model; every field that differs is named.
    """
    if init.from_hf:
        checkpoint = Checkpoint(init.from_hf)
        if differing := differing_fields(checkpoint.config, model_config):
            raise another_model(checkpoint.folder, differing)
    if init.from_run:
        run = Path(init.from_run)
        CheckpointParameters(run)
        given = _architecture(run)
        differing = differing_fields(given, model_config)
        # What a run has of a tower is in its checkpoint, and is restored as a whole.
        differing += [
            f"it has the section {section}, and the model has not"
            for section, fields in vars(given).items()
            if fields is not None and vars(model_config)[section] is None
        ]
        if differing:
            raise another_model(run, differing)


def initial_values(init: Any, model_config: Gemma4Config, abstract: TrainState, run_dir: Path) -> nnx.State | None:
    """Parameters and buffers, each shard read straight to its device; None where the run begins from random ones.

    Tensors of a checkpoint that the model does not use go to a file in the run directory, for its exports.

    Args:
      init: the section `init` of the run config.
      model_config: the architecture.
      abstract: from `state.abstract_state`.
      run_dir: of the new run.
    Raises:
      InputError: as in `check_source`.
    """
    wanted = nnx.merge_state(abstract.params, abstract.buffers)
    if init.from_hf:
        checkpoint = Checkpoint(init.from_hf)
        values = load_state(checkpoint, wanted, model_config)
        if unused := checkpoint.unused(wanted):
            _carry(partial(write_carried, checkpoint, unused), run_dir)
        return values
    if init.from_run:
        carried = Path(init.from_run) / CARRIED
        if carried.exists():
            _carry(partial(shutil.copyfile, carried), run_dir)
        return _restore(Path(init.from_run), wanted)
    return None


def _carry(write: Callable[[Path], Any], run_dir: Path) -> None:
    """Lets the first process write the tensors that exports of the run carry, whole or not at all."""
    if jax.process_index() != 0:
        return
    temporary = run_dir / f".{CARRIED}.{os.getpid()}.tmp"
    try:
        write(temporary)
        temporary.replace(run_dir / CARRIED)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{run_dir / CARRIED} cannot be written ({reason}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def _restore(run: Path, wanted: nnx.State) -> nnx.State:
    """The model of the last checkpoint of a run, on the mesh of this one and in its dtypes."""
    stored = CheckpointParameters(run)
    shapes = {path: leaf.shape for path, leaf in flatten_paths(nnx.to_pure_dict(wanted)).items()}
    if differing := sorted(
        path for path in shapes.keys() | stored.shapes.keys() if shapes.get(path) != stored.shapes.get(path)
    ):
        raise InputError(f"{run} is of another model: {', '.join(differing[:5])} are not the same.")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            nnx.replace_by_pure_dict(wanted, checkpointer.restore(stored.folder, nnx.to_pure_dict(wanted)))
    except (ValueError, KeyError, OSError) as error:  # what the library meets damaged files with
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint {stored.folder.parent} cannot be read: {reason}.") from error
    return wanted


def _architecture(run: Path) -> Gemma4Config:
    """Of the model of a run."""
    path = run / "config.json"
    try:
        return Gemma4Config.from_dict(json.loads(path.read_text("utf-8"))["model"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"init.from_run={str(run)!r} is not a run: {path} cannot be read as its config.") from error
