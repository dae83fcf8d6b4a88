"""What a run compiles, for the devices of its mesh: those of this machine, or some that are only described."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma4_jax.batch import FIELDS, Batch
from gemma4_jax.config import Gemma4Config
from gemma4_jax.data.pack import RowShape
from gemma4_jax.sharding import batch_sharding
from gemma4_jax.train.objectives.sft import sft
from gemma4_jax.train.optimizer import make_optimizer
from gemma4_jax.train.state import TrainState, abstract_state, shardings_of
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

    config: ConfigDict
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


def resolve(config: ConfigDict, mesh: Mesh) -> ConfigDict:
    """A run config with a value for every "auto" that depends on the platform of the mesh; kernels choose by shape."""
    resolved = config.copy_and_resolve_references()
    if config.train.compute_dtype == "auto":
        resolved.train.compute_dtype = "float32" if platform_of(mesh) == "cpu" else "bfloat16"
    return resolved


def platform_of(mesh: Mesh) -> str:
    """Of the devices of a mesh: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def make_program(config: ConfigDict, model_config: Gemma4Config, mesh: Mesh) -> Program:
    """What a run compiles; nothing is compiled yet.

    Args:
      config: the run config.
      model_config: the architecture that its section `model` describes.
      mesh: of devices of this machine, or of described ones (`jax.experimental.topologies`).
    """
    config = resolve(config, mesh)
    graphdef, state = abstract_state(model_config, config, mesh)
    shardings = shardings_of(state)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    steps = config.train.grad_accum_steps
    return Program(
        config,
        mesh,
        graphdef,
        state,
        make_train_step(graphdef, sft(config.train), optimizer, shardings, microbatches=steps),
        make_eval_step(graphdef, shardings, chunk=config.train.loss_chunk),
        RowShape.from_config(config.data, model_config),
    )


def compile_step(program: Program, batch_size: int) -> jax.stages.Compiled:
    """The training step, compiled for the devices of its mesh, whether they are here or not."""
    with jax.set_mesh(program.mesh):
        return program.train_step.lower(program.state, program.abstract_batch(batch_size)).compile()
