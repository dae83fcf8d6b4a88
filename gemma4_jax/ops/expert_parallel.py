"""Tokens to experts and back: the computation of a MoE layer's experts, on one device or over the `expert` axis.

Dropless: every token reaches every expert it chose, whatever the load.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gemma4_jax.errors import InputError
from gemma4_jax.ops import hopper
from gemma4_jax.ops.expert_blocks import activate, block_experts
from gemma4_jax.ops.expert_exchange import EXCHANGES, NOBODY
from gemma4_jax.ops.grouped import grouped, sort_by_group
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import BATCH_AXES

_TOKENS, _GATE_UP, _DOWN = P(BATCH_AXES, "context"), P("expert", "fsdp", None, "tensor"), P("expert", "tensor", "fsdp")

PIECE = 1.5
"""Choices that a shard works through at once, relative to those it has where all shards have the same."""


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

    Where experts are spread over shards, most choices are of others' experts, and only the routing knows how many. The
    own ones sort to the front and are worked through in pieces of PIECE times their mean number: as a rule there is
    one. What further pieces keep for the backward pass is computed again there.

    Args:
      implementation: of the grouped matmul, a key of `ops.grouped.IMPLEMENTATIONS`.
    """
    num_experts, embed_dim = gate_up.shape[:2]
    order, sizes = sort_by_group(choices.reshape(-1), num_experts)
    piece = min(math.ceil(PIECE * len(order) / num_expert_shards()), len(order))
    matrices = gate_up.reshape(num_experts, embed_dim, -1).astype(x.dtype), down.astype(x.dtype)
    return _in_pieces((x, weights, *matrices), order, sizes, piece, implementation)


def num_expert_shards() -> int:
    """Shards of the `expert` axis; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["expert"]


def _piece(
    index: Any, operands: tuple, order: jax.Array, sizes: jax.Array, piece: int, implementation: str
) -> jax.Array:
    """[M, D] float32, what the choices of one piece add to the tokens."""
    x, weights, gate_up, down = operands
    start, ends = index * piece, jnp.cumsum(sizes)
    first, last = (jnp.clip(place, start, start + piece) for place in (ends - sizes, ends))
    # The last piece may be shorter: what is behind its end belongs to no group.
    choice = jax.lax.dynamic_slice_in_dim(jnp.pad(order, (0, -len(order) % piece)), start, piece)
    token = choice // weights.shape[1]
    multiply = functools.partial(grouped, group_sizes=last - first, implementation=implementation)
    # A token's C gradients are added in float32, and so are the results of its C experts.
    wide = multiply(x.astype(jnp.float32)[token].astype(x.dtype), gate_up)
    out = multiply(activate(wide), down) * weights.reshape(-1)[choice][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[token].add(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _in_pieces(operands: tuple, order: jax.Array, sizes: jax.Array, piece: int, implementation: str) -> jax.Array:
    return _pieces_forward(operands, order, sizes, piece, implementation)[0]


def _pieces_forward(
    operands: tuple, order: jax.Array, sizes: jax.Array, piece: int, implementation: str
) -> tuple[jax.Array, tuple]:
    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + _piece(index, operands, order, sizes, piece, implementation)

    first, pull = jax.vjp(lambda operands: _piece(0, operands, order, sizes, piece, implementation), operands)
    out = first if piece == len(order) else jax.lax.fori_loop(1, -(-jnp.sum(sizes) // piece), add, first)
    return out.astype(operands[0].dtype), (pull, operands, order, sizes)


def _pieces_backward(piece: int, implementation: str, saved: tuple, gradient: jax.Array) -> tuple:
    pull, operands, order, sizes = saved
    gradient = gradient.astype(jnp.float32)

    def add(index: jax.Array, total: tuple) -> tuple:
        _, pull = jax.vjp(lambda operands: _piece(index, operands, order, sizes, piece, implementation), operands)
        return jax.tree.map(jnp.add, total, pull(gradient)[0])

    (first,) = pull(gradient)
    total = first if piece == len(order) else jax.lax.fori_loop(1, -(-jnp.sum(sizes) // piece), add, first)
    return total, *(np.zeros(index.shape, jax.dtypes.float0) for index in (order, sizes))


_in_pieces.defvjp(_pieces_forward, _pieces_backward)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "blocks": block_experts,
    "megablox": functools.partial(grouped_experts, implementation="megablox"),
    "mosaic_gpu": functools.partial(grouped_experts, implementation="mosaic_gpu"),
    "ragged": functools.partial(grouped_experts, implementation="ragged"),
    "dense": dense_experts,
}
"""Name -> what computes the experts of one device: loops over blocks of tokens; JAX's kernels for TPU; tokamax's
for Hopper GPUs; `jax.lax.ragged_dot`; everything on everything."""


class ExpertPlan(NamedTuple):
    """How experts are computed.

    Attributes:
      implementation: of one device's, a key of IMPLEMENTATIONS.
      exchange: of tokens between devices, a key of `ops.expert_exchange.EXCHANGES`.
    """

    implementation: str
    exchange: str = "gather"


def choose(policy: KernelPolicy) -> ExpertPlan:
    """What the policy asks for. "auto" is megablox on TPU and blocks elsewhere; gather everywhere.

    Raises:
      InputError: the policy names one that does not exist, or not on its platform.
    """
    of_tpu = policy.platform == "tpu"
    implementation, exchange = policy.experts, policy.expert_exchange
    against = {
        "megablox": None if of_tpu else "it is written for TPUs",
        "mosaic_gpu": hopper.reason_against(policy.platform),
    }
    possible = [name for name in IMPLEMENTATIONS if against.get(name) is None]
    _require_possible("train.experts", implementation, possible, policy.platform, against.get(implementation))
    possible_exchanges = [name for name in EXCHANGES if name != "ragged" or policy.platform != "cpu"]
    _require_possible("train.expert_exchange", exchange, possible_exchanges, policy.platform)
    if implementation == "auto":
        implementation = "megablox" if of_tpu else "blocks"
    return ExpertPlan(implementation, "gather" if exchange == "auto" else exchange)


def _require_possible(name: str, given: str, possible: list[str], platform: str, reason: str | None = None) -> None:
    *others, last = "auto", *possible
    if given not in (*others, last):
        why = f" ({reason})" if reason else ""
        must_be = f"it must be {', '.join(others)} or {last}"
        raise InputError(f"{name}={given!r} is not possible on {platform}{why}: {must_be}.")


def _gather_whole(matrix: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
    """This shard's experts, of which the devices of `fsdp` have each a part along an axis, in `dtype`."""
    # Parts are gathered as matrices with an axis of their own in front: of a gather along any other, the compiler for
    # TPU makes an all-reduce of the gradient, twice the bytes of the reduce-scatter that it is.
    parts = jax.lax.all_gather(matrix.astype(dtype).reshape(-1, matrix.shape[-1]), "fsdp").reshape(-1, *matrix.shape)
    return jnp.moveaxis(parts, 0, axis).reshape(*matrix.shape[:axis], -1, *matrix.shape[axis + 1 :])


def apply_experts(
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    implementation: str,
    exchange: str = "gather",
    is_token: jax.Array | None = None,
) -> jax.Array:
    """Sum over the chosen experts of weight * expert(token), with experts on the `expert` mesh axis.

    Inside a mesh this is a `jax.shard_map`: the tokens of an expert group travel over `expert`, each device applies the
    experts it holds, and the partial sums travel back to the tokens' own devices (and are summed over `tensor`, which
    splits each expert's hidden width). Rows and positions that the mesh does not divide are filled up with padding.

    The matrices lie as `sharding` spreads parameters, and a layer's are made whole over `fsdp` when it is their turn,
    in x's dtype. Their gradient takes the same way back: what each device has of it is rounded to x's dtype and added
    up in that over `fsdp`, as the gradients of all other weights are, and then in the dtype of the matrices over `data`
    and `context`. What comes back of other devices is named "exchanged" for remat.

    Args:
      x: [B, T, D] tokens.
      choices: [B, T, C] int32 expert indices.
      weights: [B, T, C] float32.
      gate_up: [E, D, 2, F] stacked gate and up projections, gate first. In a mesh, its axes divide E, D and F.
      down: [E, F, D].
      implementation: a key of IMPLEMENTATIONS, from `choose`.
      exchange: a key of EXCHANGES, from `choose`.
      is_token: [B, T] bool, False on padding, which goes to no expert, costs nothing and gives 0; all are tokens by
        default.
    Returns:
      [B, T, D] in x's dtype.
    """
    local = IMPLEMENTATIONS[implementation]
    if is_token is not None:
        choices = jnp.where(is_token[..., None], choices, NOBODY)

    def flat(*tokens: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(value.reshape(-1, value.shape[-1]) for value in tokens)

    def on_shard(tokens: tuple[jax.Array, ...], gate_up: jax.Array, down: jax.Array) -> jax.Array:
        matrices = {"gate_up": _gather_whole(gate_up, 1, x.dtype), "down": _gather_whole(down, 2, x.dtype)}
        apply = functools.partial(local, **matrices)
        out = EXCHANGES[exchange](*flat(*tokens), num_experts=len(gate_up), apply=apply)
        return jax.lax.psum(out.reshape(tokens[0].shape), "tensor")

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(*flat(x, choices, weights), gate_up, down).reshape(x.shape)
    num_rows, length = x.shape[:2]
    fill = -num_rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES), -length % mesh.shape["context"]

    def fill_up(value: jax.Array, nothing: int) -> jax.Array:
        return jnp.pad(value, ((0, fill[0]), (0, fill[1]), (0, 0)), constant_values=nothing)

    tokens = fill_up(x, 0), fill_up(choices, NOBODY), fill_up(weights, 0)
    out = jax.shard_map(
        on_shard,
        in_specs=(_TOKENS, _GATE_UP, _DOWN),
        out_specs=_TOKENS,
        check_vma=False,  # the loops of an implementation begin with constants
    )(tokens, gate_up, down)
    if mesh.shape["expert"] > 1:
        out = checkpoint_name(out, "exchanged")
    return out[:num_rows, :length]
