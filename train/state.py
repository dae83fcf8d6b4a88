"""`TrainState`: all that a run carries from step to step, made already spread over the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_jax.config import Gemma4Config
from gemma4_jax.layers import Buffer
from gemma4_jax.model import Gemma4
from gemma4_jax.sharding import param_shardings
from gemma4_jax.train.optimizer import make_optimizer, split_trained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run carries from step to step.

    Attributes:
      step: int32, optimizer steps taken.
      params: every nnx.Param of the model, frozen groups included.
      buffers: what the model stores but never trains.
      opt_state: of the optimizer, for trained parameters.
      rng: the run's random key. It never changes: what a step draws comes from this key with the step folded in, so
        that a resumed run draws the same.
    """

    step: jax.Array
    params: nnx.State
    buffers: nnx.State
    opt_state: optax.OptState
    rng: jax.Array


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype that `train.compute_dtype` names; "auto" is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def abstract_state(model_config: Gemma4Config, config: Any, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and a TrainState of jax.ShapeDtypeStructs that carry their shardings.

    Args:
      model_config: the architecture.
      config: the run config.
      mesh: the device mesh.
    """
    rng = jax.random.key(config.seed)
    model = nnx.eval_shape(lambda: _build(model_config, config, rng))
    state = jax.eval_shape(lambda params, buffers: _start(params, buffers, rng, config), *_variables(model))
    shardings = jax.tree.map(
        lambda node: param_shardings(node, mesh) if isinstance(node, nnx.State) else NamedSharding(mesh, P()),
        state,
        is_leaf=lambda node: isinstance(node, nnx.State),
    )
    return nnx.graphdef(model), jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )


def create_state(
    abstract: TrainState, model_config: Gemma4Config, config: Any, values: nnx.State | None = None
) -> TrainState:
    """The state of a run before its first step; each device makes its own shards and no other.

    Args:
      abstract: from `abstract_state`.
      model_config: the architecture.
      config: the run config; `seed` decides the parameters, whatever the mesh.
      values: parameters and buffers to begin from, in place of random ones. They are donated.
    """

    def start(params: nnx.State, buffers: nnx.State) -> TrainState:
        return _start(params, buffers, jax.random.split(jax.random.key(config.seed))[1], config)

    if values is not None:
        compiled = jax.jit(start, out_shardings=shardings_of(abstract), donate_argnums=(0, 1))
        return compiled(*nnx.split_state(values, nnx.Param, Buffer))

    def create() -> TrainState:
        params_key = jax.random.split(jax.random.key(config.seed))[0]
        return start(*_variables(_build(model_config, config, params_key)))

    # Run once, so on CPU, where the compiler would take many times as long as the program, it is told not to try hard.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(create, out_shardings=shardings_of(abstract), compiler_options=options)()


def shardings_of(state: TrainState) -> TrainState:
    """The sharding of every leaf of a state, concrete or abstract."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _build(model_config: Gemma4Config, config: Any, key: jax.Array) -> Gemma4:
    dtype = compute_dtype(config.train.compute_dtype)
    return Gemma4(model_config, nnx.Rngs(params=key), dtype=dtype, remat=config.train.remat)


def _variables(model: Gemma4) -> tuple[nnx.State, nnx.State]:
    return nnx.state(model, nnx.Param), nnx.state(model, Buffer)


def _start(params: nnx.State, buffers: nnx.State, rng: jax.Array, config: Any) -> TrainState:
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        buffers=buffers,
        opt_state=optimizer.init(split_trained(params, config.optimizer)[0]),
        rng=rng,
    )
