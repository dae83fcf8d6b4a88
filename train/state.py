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
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import param_shardings
from gemma4_jax.train.optimizer import make_optimizer, split_trained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run carries from step to step.

    Attributes:
      step: int32, optimizer steps taken.
      trained: the parameters that the optimizer changes.
      frozen: those of frozen groups, and the buffers: what the model stores but never trains.
      opt_state: of the optimizer, for trained parameters.
    """

    step: jax.Array
    trained: nnx.State
    frozen: nnx.State
    opt_state: optax.OptState

    @property
    def model(self) -> nnx.State:
        """Parameters and buffers together."""
        return nnx.merge_state(self.trained, self.frozen)


def abstract_state(model_config: Gemma4Config, config: Any, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and a TrainState of jax.ShapeDtypeStructs that carry their shardings.

    Args:
      model_config: the architecture.
      config: the run config, of which nothing is "auto" that the platform decides (`program.resolve`).
      mesh: the device mesh.
    """
    policy = KernelPolicy(mesh.devices.flat[0].platform, config.train.attention, config.train.experts)
    model = nnx.eval_shape(lambda: _build(model_config, config, jax.random.key(0), policy))
    state = jax.eval_shape(lambda values: _start(values, config), nnx.state(model, (nnx.Param, Buffer)))
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
    if values is not None:
        start = jax.jit(lambda values: _start(values, config), out_shardings=shardings_of(abstract), donate_argnums=0)
        return start(values)

    def create() -> TrainState:
        key = jax.random.split(jax.random.key(config.seed))[0]
        return _start(nnx.state(_build(model_config, config, key, KernelPolicy()), (nnx.Param, Buffer)), config)

    # Run once, so on CPU, where the compiler would take many times as long as the program, it is told not to try hard.
    sharding: Any = abstract.step.sharding
    is_on_cpu = sharding.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_on_cpu else None
    return jax.jit(create, out_shardings=shardings_of(abstract), compiler_options=options)()


def shardings_of(state: TrainState) -> TrainState:
    """The sharding of every leaf of a state, concrete or abstract."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _build(model_config: Gemma4Config, config: Any, key: jax.Array, policy: KernelPolicy) -> Gemma4:
    dtype = jnp.dtype(config.train.compute_dtype)
    return Gemma4(model_config, nnx.Rngs(params=key), dtype=dtype, remat=config.train.remat, kernels=policy)


def _start(values: nnx.State, config: Any) -> TrainState:
    params, buffers = nnx.split_state(values, nnx.Param, Buffer)
    trained, frozen = split_trained(params, config.optimizer)
    transform = make_optimizer(config.optimizer, config.train.num_steps).transform
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        frozen=nnx.merge_state(frozen, buffers),
        opt_state=transform.init(trained),
    )
