"""What a run begins from, where that is not random: a Hugging Face checkpoint, or another run."""

import dataclasses
import json
import os
import shutil
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
        if differing_fields(checkpoint, model_config):
            raise another_model(checkpoint, model_config)
    if init.from_run:
        CheckpointParameters(Path(init.from_run))
        _check_same_architecture(Path(init.from_run), model_config)


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
        if (unused := checkpoint.unused(wanted)) and jax.process_index() == 0:
            write_carried(checkpoint, unused, run_dir / CARRIED)
        return values
    if init.from_run:
        carried = Path(init.from_run) / CARRIED
        if carried.exists() and jax.process_index() == 0:
            temporary = run_dir / f".{CARRIED}.{os.getpid()}.tmp"
            shutil.copyfile(carried, temporary)
            temporary.replace(run_dir / CARRIED)
        return _restore(Path(init.from_run), wanted)
    return None


def _restore(run: Path, wanted: nnx.State) -> nnx.State:
    """The model of the last checkpoint of a run, on the mesh of this one."""
    stored = CheckpointParameters(run)
    shapes = {path: leaf.shape for path, leaf in flatten_paths(nnx.to_pure_dict(wanted)).items()}
    if differing := sorted(
        path for path in shapes.keys() | stored.shapes.keys() if shapes.get(path) != stored.shapes.get(path)
    ):
        raise InputError(f"{run} is of another model: {', '.join(differing[:5])} are not the same.")
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.replace_by_pure_dict(wanted, checkpointer.restore(stored.folder, nnx.to_pure_dict(wanted)))
    return wanted


def _check_same_architecture(run: Path, model_config: Gemma4Config) -> None:
    path = run / "config.json"
    try:
        given = json.loads(path.read_text("utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"init.from_run={str(run)!r} is not a run: {path} cannot be read as its config.") from error
    wanted = json.loads(json.dumps(dataclasses.asdict(model_config)))
    differing = [
        f"{section}.{name} is {(given.get(section) or {}).get(name)!r}, and {value!r} in the model"
        for section, fields in wanted.items()
        for name, value in (fields or {}).items()
        if (given.get(section) or {}).get(name) != value
    ]
    if differing:
        raise InputError(f"{run} is another model: {'; '.join(differing)}.")
