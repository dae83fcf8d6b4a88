"""What a run compiles, for the devices of its mesh: those of this machine, or some that are only described."""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from gemma4_jax.batch import FIELDS, Batch
from gemma4_jax.data.pack import RowShape
from gemma4_jax.errors import InputError
from gemma4_jax.model import attention_shapes
from gemma4_jax.ops.attention import check_policy
from gemma4_jax.run_config import RunConfig, check_mesh
from gemma4_jax.sharding import BATCH_AXES, batch_sharding
from gemma4_jax.train.objectives import Objective
from gemma4_jax.train.objectives.sft import sft
from gemma4_jax.train.optimizer import make_optimizer
from gemma4_jax.train.state import TrainState, abstract_state, kernel_policy, shardings_of
from gemma4_jax.train.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run, and what they take.

    Attributes:
      config: of the run, resolved for the mesh.
      mesh: the devices.
      graphdef: the model's structure.
      state: abstract, with shardings.
      train_step: (state, batch) -> (state, StepMetrics), jitted.
      eval_step: (trained, frozen, batch) -> EvalOutput, jitted.
      row: what a row of a batch has room for.
    """

    config: RunConfig
    mesh: Mesh
    graphdef: nnx.GraphDef
    state: TrainState
    train_step: Any
    eval_step: Any
    row: RowShape

    def abstract_batch(self, rows: int) -> Batch:
        """A batch of so many rows over all devices, abstract."""
        sizes = {**self.row.sizes(), "batch": rows, "xy": 2}
        sharding = batch_sharding(self.mesh)
        arrays: dict[str, Any] = {
            name: jax.ShapeDtypeStruct([sizes[dim] for dim in field.dims], field.dtype, sharding=sharding)
            for name, field in FIELDS.items()
        }
        return Batch(**arrays)


def resolve(config: RunConfig, mesh: Mesh) -> RunConfig:
    """A run config in which nothing is left to follow from the platform of the mesh, or from other fields.

    Raises:
      InputError: the batch does not spread evenly over the mesh.
    """
    resolved = config.resolved(mesh.shape["context"])
    check_mesh(resolved, mesh.shape)
    if config.train.compute_dtype != "auto":
        return resolved
    dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return dataclasses.replace(resolved, train=dataclasses.replace(resolved.train, compute_dtype=dtype))


def make_program(config: RunConfig, mesh: Mesh, objective: Objective | None = None) -> Program:
    """What a run compiles; nothing is compiled yet.

    Args:
      config: of the run.
      mesh: of devices of this machine, or of described ones (`jax.experimental.topologies`).
      objective: what is minimised; None is supervised training.
    Raises:
      InputError: the config is not possible for its model or the mesh.
    """
    config = resolve(config, mesh)
    row = RowShape.from_config(config.data, config.model)
    check_policy(kernel_policy(config, mesh), attention_shapes(config.model, tokens=row.tokens, patches=row.patches))
    graphdef, state = abstract_state(config, mesh, unreached=unreached(row))
    shardings = shardings_of(state)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    objective = sft(config.train) if objective is None else objective
    steps = config.train.grad_accum_steps
    return Program(
        config,
        mesh,
        graphdef,
        state,
        make_train_step(graphdef, objective, optimizer, shardings, microbatches=steps),
        make_eval_step(graphdef, shardings, chunk=config.train.loss_chunk),
        row,
    )


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of the rows of a batch this process reads, and how many parts there are.

    Processes that have other positions or heads of the same rows read the same part.

    Raises:
      InputError: the processes do not share the rows evenly.
    """
    shards = mesh.devices.reshape(math.prod(mesh.shape[axis] for axis in BATCH_AXES), -1)
    rows: dict[int, list[int]] = {}  # process -> the shards of rows of its devices
    for i, devices in enumerate(shards):
        for process in {device.process_index for device in devices}:
            rows.setdefault(process, []).append(i)
    parts = sorted(set(map(tuple, rows.values())))
    if len(set(map(len, parts))) > 1 or sum(map(len, parts)) != len(shards):
        raise InputError(
            f"mesh spreads the rows of a batch over {len(shards)} devices (data, fsdp and expert), which "
            f"{len(rows)} processes do not share evenly: let each have as many of these shards as any other, its own "
            "or, where mesh.context or mesh.tensor goes over processes, the very same as others."
        )
    return parts.index(tuple(rows[jax.process_index()])), len(parts)


def unreached(row: RowShape) -> set[str]:
    """Modules of the model that no document reaches, for a row has no room for what they read."""
    images = () if row.patches else ("vision", "image_projection")
    return {*images, *(() if row.frames else ("audio", "audio_projection"))}


def compile_step(program: Program, batch_size: int) -> jax.stages.Compiled:
    """The training step, compiled for the devices of its mesh, whether they are here or not."""
    with jax.set_mesh(program.mesh):
        return program.train_step.lower(program.state, program.abstract_batch(batch_size)).compile()
