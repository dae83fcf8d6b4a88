"""The experts of a MoE layer in one pass over blocks of tokens: what lies between the two matmuls stays in the cache.

A block is some tokens of one expert. They are read where they stand and their results are added where they belong, so
neither sorted tokens nor sorted results are ever made.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.ops.grouped import BLOCKS, from_bits, multiply, sort_by_group, to_bits, to_float32, visit_blocks


def activate(wide: jax.Array) -> jax.Array:
    """gelu(gate) * up, of [R, 2 F] with the gate first."""
    gate, up = jnp.split(wide, 2, axis=-1)
    return jax.nn.gelu(gate, approximate=True) * up


def block_experts(
    x: jax.Array, choices: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """As `expert_parallel.dense_experts`; cost grows as C, and all sums are in float32.

    Kept for the backward pass is the product with gate and up, [M * C, 2 F].
    """
    num_experts, embed_dim = gate_up.shape[:2]
    order, sizes = sort_by_group(choices.reshape(-1), num_experts)
    gate_up, down = gate_up.reshape(num_experts, embed_dim, -1).astype(x.dtype), down.astype(x.dtype)
    return _experts(x, weights, gate_up, down, order, sizes)


@jax.custom_vjp
def _experts(
    x: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, order: jax.Array, sizes: jax.Array
) -> jax.Array:
    return _forward(x, weights, gate_up, down, order, sizes)[0]


def _by_expert(weights: jax.Array, order: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(token of each sorted choice, its weight, end of each expert's choices [E]); the last block has room."""
    num_tokens, num_choices = weights.shape
    token = jnp.pad(order // num_choices, (0, BLOCKS[-1]), constant_values=num_tokens)
    return token, jnp.pad(weights.reshape(-1)[order], (0, BLOCKS[-1])), jnp.cumsum(sizes)


def _forward(
    x: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, order: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, tuple]:
    token, weight, ends = _by_expert(weights, order, sizes)
    (x_float32,) = to_float32(x)

    def visit_expert(carry: tuple, expert: tuple) -> tuple[tuple, None]:
        gate_up, down, size, end = expert
        gate_up, down = to_float32(*(from_bits(bits, x.dtype) for bits in (gate_up, down)))

        def visit(at: jax.Array, block: int, carry: tuple) -> tuple:
            out, wide = carry
            own = _own_tokens(token, at, end, block, len(x))
            product = multiply(_take(x_float32, own), gate_up, (1, 0))
            hidden = activate(product) * jax.lax.dynamic_slice_in_dim(weight, at, block)[:, None]
            out = out.at[own].add(multiply(hidden, down, (1, 0)), mode="drop")
            # What fills the block is written over by the next expert.
            return out, jax.lax.dynamic_update_slice_in_dim(wide, to_bits(product.astype(x.dtype)), at, 0)

        return visit_blocks(end - size, end, visit, carry, num_rows=len(order)), None

    nothing = jnp.zeros(x.shape, jnp.float32), to_bits(jnp.zeros((len(token), gate_up.shape[2]), x.dtype))
    (out, wide), _ = jax.lax.scan(visit_expert, nothing, (to_bits(gate_up), to_bits(down), sizes, ends))
    return out.astype(x.dtype), (x, weights, gate_up, down, order, sizes, wide)


def _backward(saved: tuple, gradient: jax.Array) -> tuple:
    x, weights, gate_up, down, order, sizes, wide = saved
    token, weight, ends = _by_expert(weights, order, sizes)
    x_float32, gradient = to_float32(x, gradient)

    def visit_expert(carry: tuple, expert: tuple) -> tuple[tuple, tuple]:
        gate_up, down, size, end = expert
        gate_up, down = to_float32(*(from_bits(bits, x.dtype) for bits in (gate_up, down)))

        def visit(at: jax.Array, block: int, carry: tuple) -> tuple:
            to_x, to_weight, to_gate_up, to_down = carry
            own = _own_tokens(token, at, end, block, len(x))
            is_own = (own < len(x))[:, None]
            product = from_bits(jax.lax.dynamic_slice_in_dim(wide, at, block), x.dtype)
            product = jnp.where(is_own, product, 0)
            share = jnp.where(is_own, jax.lax.dynamic_slice_in_dim(weight, at, block)[:, None], 0)
            hidden, pull = jax.vjp(activate, product.astype(jnp.float32))
            to_out = _take(gradient, own)
            to_hidden = multiply(to_out, down, (1, 1))
            (to_product,) = pull(jnp.where(is_own, to_hidden * share, 0))
            to_weight = jax.lax.dynamic_update_slice_in_dim(to_weight, jnp.sum(to_hidden * hidden, axis=1), at, 0)
            return (
                to_x.at[own].add(multiply(to_product, gate_up, (1, 1)), mode="drop"),
                to_weight,
                to_gate_up + multiply(_take(x_float32, own), to_product, (0, 0)),
                to_down + multiply(hidden * share, to_out, (0, 0)),
            )

        nothing = (jnp.zeros(matrix.shape, jnp.float32) for matrix in (gate_up, down))
        *carry, to_gate_up, to_down = visit_blocks(end - size, end, visit, (*carry, *nothing), num_rows=len(order))
        return tuple(carry), (to_bits(to_gate_up.astype(x.dtype)), to_bits(to_down.astype(x.dtype)))

    nothing = jnp.zeros(x.shape, jnp.float32), jnp.zeros(len(token), jnp.float32)
    (to_x, to_weight), to_matrices = jax.lax.scan(visit_expert, nothing, (to_bits(gate_up), to_bits(down), sizes, ends))
    to_gate_up, to_down = (from_bits(bits, x.dtype) for bits in to_matrices)
    to_weight = jnp.where(jnp.arange(len(order)) < ends[-1], to_weight[: len(order)], 0)
    to_weights = (
        jnp.zeros(len(order), weights.dtype).at[order].set(to_weight.astype(weights.dtype), unique_indices=True)
    )
    no_gradient = (np.zeros(index.shape, jax.dtypes.float0) for index in (order, sizes))
    return to_x.astype(x.dtype), to_weights.reshape(weights.shape), to_gate_up, to_down, *no_gradient


_experts.defvjp(_forward, _backward)


def _own_tokens(token: jax.Array, at: jax.Array, end: jax.Array, block: int, num_tokens: int) -> jax.Array:
    """[block] tokens of the block that begins at `at`; `num_tokens`, which is nobody, behind the expert's last."""
    is_own = at + jnp.arange(block) < end
    return jnp.where(is_own, jax.lax.dynamic_slice_in_dim(token, at, block), num_tokens)


_take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
"""Rows of tokens; zero for nobody."""
