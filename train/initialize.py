"""What a run begins from, where that is not random: a Hugging Face checkpoint, or another run."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from gemma4_jax.checkpoints.integrity import newest_intact
from gemma4_jax.checkpoints.parameters import CheckpointParameters, flatten_paths
from gemma4_jax.config import Gemma4Config
from gemma4_jax.errors import InputError
from gemma4_jax.fields import parse
from gemma4_jax.files import local_path
from gemma4_jax.hf.load import Checkpoint, another_model, differing_fields, load_state, write_carried
from gemma4_jax.hf.names import abbreviate, tensors
from gemma4_jax.hf.save import CARRIED
from gemma4_jax.processes import agree, is_first, led_by_first
from gemma4_jax.run_config import RunConfig
from gemma4_jax.train.state import TrainState, random_model
from gemma4_jax.train.upcycle import dense_config, upcycle, without_experts


def check_source(config: RunConfig) -> None:
    """Checks, before anything is written, that a run can begin from what its config names.

    Raises:
      InputError: it is not there, is damaged, or is another model; every field that differs is named.
    """
    init, model_config = config.init, config.model
    if init.from_hf:
        checkpoint = Checkpoint(init.from_hf)
        if differing := differing_fields(checkpoint.config, model_config):
            raise another_model(checkpoint.folder, differing)
    if init.upcycle_from:
        checkpoint = Checkpoint(init.upcycle_from)
        if differing := differing_fields(checkpoint.config, dense_config(model_config)):
            raise another_model(checkpoint.folder, differing)
    if init.from_run:
        run = local_path(init.from_run)
        with led_by_first():
            if is_first():
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


def initial_values(config: RunConfig, abstract: TrainState, run_dir: Path) -> nnx.State | None:
    """Parameters and buffers, each shard read straight to its device; None where the run begins from random ones.

    Tensors of a checkpoint that the model does not use go to a file in the run directory, for its exports.

    Args:
      config: of the run.
      abstract: from `state.abstract_state`.
      run_dir: of the new run.
    Raises:
      InputError: as in `check_source`, or a parameter is not made of finite numbers.
    """
    init, model_config, wanted = config.init, config.model, abstract.model
    if init.from_hf:
        checkpoint = Checkpoint(init.from_hf)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*: NaN in ")  # _check_values refuses it
            values = load_state(checkpoint, wanted, model_config)
        if unused := checkpoint.unused(wanted):
            _carry(partial(write_carried, checkpoint, unused), run_dir)
        _check_values(values, model_config, f"init.from_hf={init.from_hf!r}")
        return values
    if init.upcycle_from:
        checkpoint = Checkpoint(init.upcycle_from)
        dense = load_state(checkpoint, without_experts(wanted), dense_config(model_config))
        _check_values(dense, dense_config(model_config), f"init.upcycle_from={init.upcycle_from!r}")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        make = jax.jit(lambda dense: upcycle(dense, random_model(config)), out_shardings=shardings, donate_argnums=0)
        return make(dense)
    if init.from_run:
        run = local_path(init.from_run)
        carried = run / CARRIED
        if agree(carried.exists):
            _carry(partial(shutil.copyfile, carried), run_dir)
        values = _restore(run, wanted)
        _check_values(values, model_config, f"init.from_run={init.from_run!r}")
        return values
    return None


def _check_values(values: nnx.State, model_config: Gemma4Config, given: str) -> None:
    """Names the tensors, as a checkpoint calls them, in which a parameter is infinite or not a number."""
    # Each shape is compiled once. Buffers may be infinite: bounds of a tower that clips nothing.
    is_finite = jax.jit(lambda x: jnp.isfinite(x).all())
    params = flatten_paths(nnx.to_pure_dict(nnx.split_state(values, nnx.Param, ...)[0]))
    sane = jax.device_get({path: is_finite(value) for path, value in params.items()})
    if all(sane.values()):
        return
    broken = [
        tensor.name
        for tensor in tensors(model_config)
        if tensor.path in params
        and not sane[tensor.path]
        and not is_finite(params[tensor.path] if tensor.index is None else params[tensor.path][tensor.index])
    ]
    named = abbreviate(broken)
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    raise InputError(
        f"{given} holds values that are infinite or not numbers, in {', '.join(named[:5])}{more}: begin from another "
        "checkpoint."
    )


def _carry(write: Callable[[Path], Any], run_dir: Path) -> None:
    """Lets the first process write the tensors that exports of the run carry, whole or not at all."""
    temporary = run_dir / f".{CARRIED}.{os.getpid()}.tmp"
    with led_by_first():
        if not is_first():
            return
        try:
            write(temporary)
            temporary.replace(run_dir / CARRIED)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(f"{run_dir / CARRIED} cannot be written ({reason}).") from error
        finally:
            temporary.unlink(missing_ok=True)


def _restore(run: Path, wanted: nnx.State) -> nnx.State:
    """The model of the newest intact checkpoint of a run, on the mesh of this one and in its dtypes."""
    stored = CheckpointParameters(run, agree(lambda: newest_intact(run)))
    leaves = flatten_paths(nnx.to_pure_dict(wanted))
    if differing := sorted(
        path
        for path in leaves.keys() | stored.shapes.keys()
        if path not in leaves or leaves[path].shape != stored.shapes.get(path)
    ):
        raise InputError(f"{run} is of another model: {', '.join(differing[:5])} are not the same.")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            parts = [_restore_part(checkpointer, folder, stored, wanted) for folder in set(stored.folders.values())]
    except Exception as error:  # the library's for files that it did not expect
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint {stored.folder.parent} cannot be read: {reason}.") from error
    return nnx.merge_state(*parts)


def _restore_part(
    checkpointer: ocp.StandardCheckpointer, folder: Path, stored: CheckpointParameters, wanted: nnx.State
) -> nnx.State:
    """What one folder of a checkpoint holds of the model."""
    part, _ = nnx.split_state(wanted, lambda path, _: stored.folders[".".join(map(str, path))] == folder, ...)
    nnx.replace_by_pure_dict(part, checkpointer.restore(folder, nnx.to_pure_dict(part)))
    return part


def _architecture(run: Path) -> Gemma4Config:
    """Of the model of a run."""
    path = run / "config.json"
    try:
        return parse(Gemma4Config, json.loads(path.read_text("utf-8"))["model"], "model")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"init.from_run={str(run)!r} is not a run: {path} cannot be read as its config.") from error
