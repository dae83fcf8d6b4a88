"""A stack of layers: the same as a loop over them, for every remat policy, and as short to trace at every depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.errors import InputError
from gemma4_jax.layers import Linear
from gemma4_jax.ops.attention import attend
from gemma4_jax.ops.attention.spans import document_spans
from gemma4_jax.run_config import TrainConfig
from gemma4_jax.stack import REMAT_POLICIES, run_stack, stack_modules

WIDTH = 4


def build(rngs: nnx.Rngs) -> Linear:
    return Linear(rngs, {"embed": WIDTH}, {"mlp": WIDTH}, param_dtype=jnp.float32)


def step(layer: Linear, x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = jnp.sin(layer(x) + shift)
    return x, jnp.sum(x)


def run(stack: nnx.Module, policy: str = "none") -> tuple[jax.Array, jax.Array]:
    depth = stack.kernel.get_value().shape[0]
    return run_stack(stack, step, jnp.ones((3, WIDTH)), jnp.arange(depth) / 10, remat_policy=policy)


def test_a_stack_is_a_loop_over_its_layers():
    stack = stack_modules(build, nnx.Rngs(0), 3)
    x, sums = jnp.ones((3, WIDTH)), []
    for layer, kernel in enumerate(stack.kernel.get_value()):
        x = jnp.sin(x @ kernel + layer / 10)
        sums.append(jnp.sum(x))
    last, outputs = run(stack)
    # float32 sums in another order: the largest measured error is 1.2e-7.
    np.testing.assert_allclose(last, x, rtol=0, atol=1e-6)
    np.testing.assert_allclose(outputs, jnp.stack(sums), rtol=0, atol=1e-5)


def test_its_layers_start_apart():
    first, second = stack_modules(build, nnx.Rngs(0), 2).kernel.get_value()
    assert np.abs(first - second).max() > 0.1


def kept_products(policy: str) -> int:
    """Matrix products in the program of the gradient: three a layer, and those that are made again."""
    stack = stack_modules(build, nnx.Rngs(0), 3)
    gradient = nnx.grad(lambda stack: jnp.sum(run(stack, policy)[0]))
    return str(jax.make_jaxpr(lambda stack: nnx.state(gradient(stack)))(stack)).count("dot_general[")


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_every_policy_has_the_same_gradient(policy):
    stack = stack_modules(build, nnx.Rngs(0), 3)
    given, expected = (
        nnx.grad(lambda stack, policy=policy: jnp.sum(run(stack, policy)[0]))(stack)["kernel"].get_value()
        for policy in (policy, "none")
    )
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-6)


def test_a_policy_says_what_is_computed_again():
    assert [kept_products(policy) for policy in ("none", "dots", "full")] == [3, 3, 4]


def test_attention_is_not_computed_again_where_its_results_are_kept():
    """Two products forward and five backward in the loops of blocks; two more to compute it again."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 256, 2, 8)) for i in range(3))
    index = jnp.arange(256)[None]

    def products(policy: str, implementation: str, window: int | None) -> int:
        spans = document_spans(index, index, window=window)

        def layer(q: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(attend(jnp.sin(q), k, v, spans, implementation=implementation)))

        kept = layer if policy == "none" else jax.checkpoint(layer, policy=REMAT_POLICIES[policy])
        return str(jax.make_jaxpr(jax.grad(kept))(q)).count("dot_general[")

    for implementation, window in (("blockwise", None), ("banded", 32)):
        counts = [products(policy, implementation, window) for policy in ("none", "attention", "full")]
        assert counts == [7, 7, 9], implementation


def test_what_is_offloaded_goes_to_the_memory_of_the_host():
    stack = stack_modules(build, nnx.Rngs(0), 3)
    program = jax.make_jaxpr(nnx.grad(lambda stack: jnp.sum(run(stack, "offload")[0])))(stack)
    assert "f32<host>[3,3,4] = scan[" in str(program)


def test_the_config_knows_the_policies():
    for policy in REMAT_POLICIES:
        assert TrainConfig(remat=policy).remat == policy
    with pytest.raises(InputError, match=f"one of {', '.join(REMAT_POLICIES)}"):
        TrainConfig(remat="half")


def test_the_program_does_not_grow_with_depth():
    def equations(depth: int) -> int:
        stack = stack_modules(build, nnx.Rngs(0), depth)
        return str(jax.make_jaxpr(lambda: run(stack, "full"))()).count("\n")

    assert equations(2) == equations(9)
