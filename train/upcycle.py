"""A model with experts that begins as a dense one, and at first computes what that computes.

The dense MLP stays what it was. Each expert begins as a part of it, some of its hidden channels, and the norm behind
the experts' branch begins at zero, which their first gradients open. The router begins at random.
Source: Komatsuzaki et al. 2022 (arXiv:2212.05055), for a layer whose experts stand beside a dense MLP.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import Gemma4Config


def dense_config(config: Gemma4Config) -> Gemma4Config:
    """The same architecture without experts."""
    text = dataclasses.replace(config.text, num_experts=0, num_experts_per_token=0, expert_dim=0)
    return dataclasses.replace(config, text=text)


def without_experts(state: nnx.State) -> nnx.State:
    """The parameters and buffers that a dense model has too."""
    return nnx.split_state(state, lambda path, _: "moe" not in path, ...)[0]


def upcycle(dense: nnx.State, random: nnx.State) -> nnx.State:
    """Parameters of a model with experts.

    Args:
      dense: parameters and buffers of the dense model.
      random: of a new model with experts, which gives its routers, and every shape.
    Returns:
      A state in the structure of `random`.
    """
    values = dict(nnx.to_flat_state(dense))

    def begin(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if path in values:
            return values[path]
        layer, part = path[: path.index("moe")], path[path.index("moe") + 1 :]
        new = variable.get_value()

        def kernel(name: str) -> jax.Array:
            return values[(*layer, "mlp", name, "kernel")].get_value()

        if part == ("experts", "gate_up"):
            num_experts, _, _, width = new.shape[-4:]
            gate, up = (_parts(kernel(name), num_experts, width, axis=-1) for name in ("gate", "up"))
            new = jnp.moveaxis(jnp.stack([gate, up], axis=-2), -3, -4)
        elif part == ("experts", "down"):
            num_experts, width, _ = new.shape[-3:]
            new = _parts(kernel("down"), num_experts, width, axis=-2)
        elif part == ("pre_norm", "scale"):
            new = values[(*layer, "pre_mlp_norm", "scale")].get_value()
        elif part == ("post_norm", "scale"):
            new = jnp.zeros_like(new)
        return variable.replace(new.astype(variable.get_value().dtype))

    return nnx.map_state(begin, random)


def _parts(kernel: jax.Array, num_experts: int, width: int, *, axis: int) -> jax.Array:
    """[..., F, ...] along an axis to [..., E, width, ...]: expert by expert, and around again where F is too few."""
    channels = jnp.arange(num_experts * width).reshape(num_experts, width) % kernel.shape[axis]
    return jnp.take(kernel, channels, axis=axis)
