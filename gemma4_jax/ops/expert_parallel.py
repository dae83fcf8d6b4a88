"""Tokens to experts and back: the computation of a MoE layer's experts, on one device or over the `expert` axis.

Dropless: every token reaches every expert it chose, whatever the load.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gemma4_jax.errors import InputError
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import BATCH_AXES


def dense_experts(
    x: jax.Array, choices: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Every expert on every token, weighted by the choice: the reference, and the fastest way for a few tiny experts.

    Cost grows as E rather than C.

    Args:
      x: [M, D] tokens.
      choices: [M, C] int32, chosen experts; those outside of [0, E) belong to another shard and add nothing.
      weights: [M, C] float32 weight of each choice.
      gate_up: [E, D, 2, F]; gate first.
      down: [E, F, D].
    Returns:
      [M, D] in x's dtype.
    """
    num_experts = gate_up.shape[0]
    share = jnp.sum(jax.nn.one_hot(choices, num_experts, dtype=weights.dtype) * weights[..., None], axis=1)
    gate, up = jnp.moveaxis(jnp.einsum("md,edgf->mgef", x, gate_up.astype(x.dtype)), 1, 0)
    hidden = jax.nn.gelu(gate, approximate=True) * up * share[..., None].astype(x.dtype)
    return jnp.einsum("mef,efd->md", hidden, down.astype(x.dtype))


def ragged_experts(
    x: jax.Array, choices: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Tokens sorted by expert, then one grouped matmul over the sorted rows. Arguments as in `dense_experts`."""
    num_experts, embed_dim, _, expert_dim = gate_up.shape
    num_tokens, num_choices = choices.shape
    flat = choices.reshape(-1)
    # Choices of other shards sort behind all local experts, where the grouped matmul does not reach.
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(flat, stable=True)
    group_sizes = jnp.bincount(flat, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    rows = x[order // num_choices]
    wide = jax.lax.ragged_dot(rows, gate_up.reshape(num_experts, embed_dim, -1).astype(x.dtype), group_sizes)
    gate, up = wide[:, :expert_dim], wide[:, expert_dim:]
    out = jax.lax.ragged_dot(jax.nn.gelu(gate, approximate=True) * up, down.astype(x.dtype), group_sizes)
    is_local = jnp.arange(flat.size) < jnp.sum(group_sizes)
    out = jnp.where(is_local[:, None], out * weights.reshape(-1)[order][:, None].astype(x.dtype), 0)
    return jnp.zeros_like(x, shape=(num_tokens, embed_dim)).at[order // num_choices].add(out)


IMPLEMENTATIONS = {"dense": dense_experts, "ragged": ragged_experts}


def choose(policy: KernelPolicy) -> str:
    """The implementation: "auto" is ragged except on CPU, where no grouped matmul exists.

    Raises:
      InputError: the policy names one that does not exist.
    """
    if policy.experts == "auto":
        return "dense" if policy.platform == "cpu" else "ragged"
    if policy.experts not in IMPLEMENTATIONS:
        raise InputError(
            f"experts={policy.experts!r} is not possible: it must be auto, {' or '.join(IMPLEMENTATIONS)}."
        )
    return policy.experts


def apply_experts(
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    implementation: str,
) -> jax.Array:
    """Sum over the chosen experts of weight * expert(token), with experts on the `expert` mesh axis.

    Inside a mesh this is a `jax.shard_map`: the tokens of an expert group are gathered over `expert`, each device
    applies the experts it holds, and the partial sums are scattered back to the tokens' own devices (and summed over
    `tensor`, which splits each expert's hidden width).

    Args:
      x: [B, T, D] tokens.
      choices: [B, T, C] int32 expert indices.
      weights: [B, T, C] float32.
      gate_up: [E, D, 2, F] stacked gate and up projections, gate first.
      down: [E, F, D].
      implementation: a key of IMPLEMENTATIONS, from `choose`.
    Returns:
      [B, T, D] in x's dtype.
    """
    local = IMPLEMENTATIONS[implementation]

    def on_rows(x: jax.Array, choices: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        num_choices = choices.shape[-1]
        flat = x.reshape(-1, x.shape[-1])
        out = local(flat, choices.reshape(-1, num_choices), weights.reshape(-1, num_choices), gate_up, down)
        return out.reshape(x.shape)

    def on_shard(tokens: tuple[jax.Array, ...], gate_up: jax.Array, down: jax.Array) -> jax.Array:
        x, choices, weights = (jax.lax.all_gather(value, "expert", axis=0, tiled=True) for value in tokens)
        first = jax.lax.axis_index("expert") * gate_up.shape[0]
        out = on_rows(x, choices - first, weights, gate_up, down)
        out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
        return jax.lax.psum(out, "tensor")

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return on_rows(x, choices, weights, gate_up, down)
    rows = P(BATCH_AXES, "context")
    return jax.shard_map(
        on_shard,
        in_specs=(rows, P("expert", None, None, "tensor"), P("expert", "tensor")),
        out_specs=rows,
    )((x, choices, weights), gate_up, down)
