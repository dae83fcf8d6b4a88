"""The experts of a MoE layer in one pass over blocks of tokens: what lies between the two matmuls stays in the cache.

A block is some tokens of one expert. They are read where they stand and their results are added where they belong, so
neither sorted tokens nor sorted results are ever made. What fills an expert's last block is its last token again, with
weight zero: no block reads another expert's token.
"""

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
    choice = jnp.pad(order, (0, BLOCKS[-1]))
    return choice // weights.shape[1], weights.reshape(-1)[choice], jnp.cumsum(sizes)


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
            own, share, _ = _block(token, weight, at, end, block)
            product = multiply(_take(x_float32, own), gate_up, (1, 0))
            out = _add(out, own, multiply(activate(product) * share, down, (1, 0)))
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
            own, share, is_own = _block(token, weight, at, end, block)
            product = from_bits(jax.lax.dynamic_slice_in_dim(wide, at, block), x.dtype)
            # Here alone what fills the block is another expert's, and may be no number.
            hidden, pull = jax.vjp(activate, jnp.where(is_own, product, 0).astype(jnp.float32))
            to_out = _take(gradient, own)
            to_hidden = multiply(to_out, down, (1, 1))
            (to_product,) = pull(to_hidden * share)
            to_weight = jax.lax.dynamic_update_slice_in_dim(to_weight, jnp.sum(to_hidden * hidden, axis=1), at, 0)
            return (
                _add(to_x, own, multiply(to_product, gate_up, (1, 1))),
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


def _block(
    token: jax.Array, weight: jax.Array, at: jax.Array, end: jax.Array, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [block] of the block that begins at `at`, their weights and which are no filling, both [block, 1].

    Behind a barrier: XLA would compute them again for every number of the rows that they point to.
    """
    place = at + jnp.arange(block)
    is_own = place < end
    share = jnp.where(is_own, jax.lax.dynamic_slice_in_dim(weight, at, block), 0)
    own, share, is_own = jax.lax.optimization_barrier((_take(token, jnp.minimum(place, end - 1)), share, is_own))
    return own, share[:, None], is_own[:, None]


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _add(x: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    return x.at[rows].add(values, mode="promise_in_bounds", wrap_negative_indices=False)
