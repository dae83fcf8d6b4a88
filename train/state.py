"""`TrainState`: all that a run carries from step to step, made already spread over the mesh."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_jax.layers import Buffer
from gemma4_jax.model import Gemma4
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.run_config import RunConfig
from gemma4_jax.sharding import param_shardings
from gemma4_jax.train.optimizer import make_optimizer, split_trained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run carries from step to step.

    Attributes:
      step: int32, optimizer steps taken.
      trained: the parameters that the optimizer changes.
      frozen: those that it does not, in train.frozen_dtype, and the buffers: what the model stores but never trains.
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


def kernel_policy(config: RunConfig, mesh: Mesh) -> KernelPolicy:
    """What computes attention and experts of a run, on the platform of the mesh."""
    train = config.train
    return KernelPolicy(mesh.devices.flat[0].platform, train.attention, train.experts, train.expert_exchange)


def abstract_state(config: RunConfig, mesh: Mesh, *, unreached: Collection[str]) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and a TrainState of jax.ShapeDtypeStructs that carry their shardings.

    Args:
      config: of the run, resolved.
      mesh: the device mesh.
      unreached: modules of the model that no document of the run reaches; they are frozen.
    Raises:
      InputError: the groups of parameters are not possible for this model.
    """
    policy = kernel_policy(config, mesh)
    model = nnx.eval_shape(lambda: _build(config, jax.random.key(0), policy))
    params, buffers = nnx.split_state(nnx.state(model, (nnx.Param, Buffer)), nnx.Param, Buffer)
    trained, _ = split_trained(params, config.optimizer, unreached=unreached)
    paths = {path for path, _ in nnx.to_flat_state(trained)}
    state = jax.eval_shape(lambda values: _start(values, config, paths), nnx.merge_state(params, buffers))
    shardings = jax.tree.map(
        lambda node: param_shardings(node, mesh) if isinstance(node, nnx.State) else NamedSharding(mesh, P()),
        state,
        is_leaf=lambda node: isinstance(node, nnx.State),
    )
    return nnx.graphdef(model), jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )


def create_state(abstract: TrainState, config: RunConfig, values: nnx.State | None = None) -> TrainState:
    """The state of a run before its first step; each device makes its own shards and no other.

    Args:
      abstract: from `abstract_state`.
      config: of the run, resolved; `seed` decides the parameters, whatever the mesh.
      values: parameters and buffers to begin from, in place of random ones. They are donated.
    """
    paths = {path for path, _ in nnx.to_flat_state(abstract.trained)}
    if values is not None:
        start = jax.jit(
            lambda values: _start(values, config, paths), out_shardings=shardings_of(abstract), donate_argnums=0
        )
        return start(values)

    def create() -> TrainState:
        return _start(random_model(config), config, paths)

    # Run once, so on CPU, where the compiler would take many times as long as the program, it is told not to try hard.
    sharding: Any = abstract.step.sharding
    is_on_cpu = sharding.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_on_cpu else None
    return jax.jit(create, out_shardings=shardings_of(abstract), compiler_options=options)()


def random_model(config: RunConfig) -> nnx.State:
    """Parameters and buffers before the first step; to be compiled, with the shardings that they are to have."""
    key = jax.random.split(jax.random.key(config.seed))[0]
    return nnx.state(_build(config, key, KernelPolicy()), (nnx.Param, Buffer))


def shardings_of(state: TrainState) -> TrainState:
    """The sharding of every leaf of a state, concrete or abstract."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _build(config: RunConfig, key: jax.Array, policy: KernelPolicy) -> Gemma4:
    dtype = jnp.dtype(config.train.compute_dtype)
    return Gemma4(config.model, nnx.Rngs(params=key), dtype=dtype, remat=config.train.remat, kernels=policy)


def _start(values: nnx.State, config: RunConfig, trained_paths: Collection[tuple]) -> TrainState:
    """A state before the first step, of a model's parameters and buffers."""
    trained, frozen, buffers = nnx.split_state(values, lambda path, _: path in trained_paths, nnx.Param, ...)
    frozen = jax.tree.map(lambda x: x.astype(config.train.frozen_dtype), frozen)
    transform = make_optimizer(config.optimizer, config.train.num_steps).transform
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        frozen=nnx.merge_state(frozen, buffers),
        opt_state=transform.init(trained),
    )
