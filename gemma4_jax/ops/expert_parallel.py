"""Tokens to experts and back: the computation of a MoE layer's experts, on one device or over the `expert` axis.

Dropless: every token reaches every expert it chose, whatever the load.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gemma4_jax.errors import InputError
from gemma4_jax.ops.expert_blocks import activate, block_experts
from gemma4_jax.ops.grouped import grouped, sort_by_group
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import BATCH_AXES

NOBODY = -(2**30)
"""A choice that is of no expert, on any shard."""


def dense_experts(
    x: jax.Array, choices: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Every expert on every token, weighted by the choice: the reference.

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


def grouped_experts(
    x: jax.Array, choices: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, *, implementation: str
) -> jax.Array:
    """Tokens sorted by expert, then two grouped matmuls over the sorted rows. Arguments as in `dense_experts`.

    Args:
      implementation: of the grouped matmul, a key of `ops.grouped.IMPLEMENTATIONS`.
    """
    num_experts, embed_dim = gate_up.shape[:2]
    num_tokens, num_choices = choices.shape
    order, sizes = sort_by_group(choices.reshape(-1), num_experts)
    token = order // num_choices
    multiply = functools.partial(grouped, group_sizes=sizes, implementation=implementation)
    # A token's C gradients are added in float32, and so are the results of its C experts.
    rows = x.astype(jnp.float32)[token].astype(x.dtype)
    wide = multiply(rows, gate_up.reshape(num_experts, embed_dim, -1).astype(x.dtype))
    out = multiply(activate(wide), down.astype(x.dtype)) * weights.reshape(-1)[order][:, None]
    return jnp.zeros((num_tokens, embed_dim), jnp.float32).at[token].add(out).astype(x.dtype)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "blocks": block_experts,
    "megablox": functools.partial(grouped_experts, implementation="megablox"),
    "ragged": functools.partial(grouped_experts, implementation="ragged"),
    "dense": dense_experts,
}
"""Name -> what computes the experts of one device: loops over blocks of tokens; JAX's kernels for TPU;
`jax.lax.ragged_dot`; everything on everything."""


def choose(policy: KernelPolicy) -> str:
    """The implementation: "auto" is megablox on TPU and blocks elsewhere.

    Raises:
      InputError: the policy names one that does not exist, or not on its platform.
    """
    if policy.experts == "auto":
        return "megablox" if policy.platform == "tpu" else "blocks"
    possible = [name for name in IMPLEMENTATIONS if name != "megablox" or policy.platform == "tpu"]
    if policy.experts not in possible:
        raise InputError(
            f"experts={policy.experts!r} is not possible on {policy.platform}: "
            f"it must be auto, {', '.join(possible[:-1])} or {possible[-1]}."
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
    is_token: jax.Array | None = None,
) -> jax.Array:
    """Sum over the chosen experts of weight * expert(token), with experts on the `expert` mesh axis.

    Inside a mesh this is a `jax.shard_map`: the tokens of an expert group are gathered over `expert`, each device
    applies the experts it holds, and the partial sums are scattered back to the tokens' own devices (and summed over
    `tensor`, which splits each expert's hidden width). Rows and positions that the mesh does not divide are filled up
    with padding.

    Args:
      x: [B, T, D] tokens.
      choices: [B, T, C] int32 expert indices.
      weights: [B, T, C] float32.
      gate_up: [E, D, 2, F] stacked gate and up projections, gate first.
      down: [E, F, D].
      implementation: a key of IMPLEMENTATIONS, from `choose`.
      is_token: [B, T] bool, False on padding, which goes to no expert, costs nothing and gives 0; all are tokens by
        default.
    Returns:
      [B, T, D] in x's dtype.
    """
    local = IMPLEMENTATIONS[implementation]
    if is_token is not None:
        choices = jnp.where(is_token[..., None], choices, NOBODY)

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
    num_rows, length = x.shape[:2]
    fill = -num_rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES), -length % mesh.shape["context"]

    def fill_up(value: jax.Array, nothing: int) -> jax.Array:
        return jnp.pad(value, ((0, fill[0]), (0, fill[1]), (0, 0)), constant_values=nothing)

    tokens = fill_up(x, 0), fill_up(choices, NOBODY), fill_up(weights, 0)
    rows = P(BATCH_AXES, "context")
    out = jax.shard_map(
        on_shard,
        in_specs=(rows, P("expert", None, None, "tensor"), P("expert", "tensor")),
        out_specs=rows,
        check_vma=False,  # the loops of an implementation begin with constants
    )(tokens, gate_up, down)
    return out[:num_rows, :length]
