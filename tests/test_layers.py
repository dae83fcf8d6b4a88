import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.layers import GatedMLP, RMSNorm, gelu, rms_normalize

# float32 sums in another order, relative to the largest entry: the largest measured error is 4e-7.
TOLERANCE = 2e-6


def value_and_gradients(function, *arrays):
    """What a function gives, and the gradients of its sum with fixed random weights."""

    def weighted(*arrays):
        out = function(*arrays).astype(jnp.float32)
        return jnp.sum(out * jax.random.normal(jax.random.key(9), out.shape)), out

    gradients, out = jax.grad(weighted, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (2, 5, 3, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, TOLERANCE), (jnp.bfloat16, 4e-3)])
def test_a_norm_has_the_gradients_of_its_formula(shape, dtype, tolerance):
    """In bfloat16 both round once, at the end."""
    x = (3 * jax.random.normal(jax.random.key(0), shape)).astype(dtype)
    graphdef, _ = nnx.split(RMSNorm({"embed": 8}, eps=1e-6, param_dtype=jnp.float32))

    def ours(x, scale):
        return nnx.merge(graphdef, nnx.State({"scale": nnx.Param(scale)}))(x)

    def formula(x, scale):
        return (rms_normalize(x, 1e-6) * scale).astype(dtype)

    scale = jax.random.normal(jax.random.key(1), (8,))
    for given, expected in zip(
        value_and_gradients(ours, x, scale), value_and_gradients(formula, x, scale), strict=True
    ):
        np.testing.assert_allclose(given, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_a_norm_keeps_its_input_and_one_number_a_row_for_the_backward_pass():
    norm = RMSNorm({"embed": 8}, eps=1e-6, param_dtype=jnp.float32)
    _, backward = jax.vjp(norm, jnp.ones((4, 5, 8), jnp.bfloat16))
    kept = sorted(str(jax.typeof(x)) for x in jax.tree.leaves(backward))
    assert kept == ["bfloat16[4,5,8]", "float32[4,5]", "float32[8]"]


def test_an_mlp_keeps_two_wide_arrays_and_has_the_gradients_of_its_formula():
    mlp = GatedMLP(nnx.Rngs(0), {"embed": 4}, {"mlp": 16}, param_dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    _, backward = jax.vjp(mlp, x)
    wide = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == (2, 3, 16)]
    assert len(wide) == 2

    def formula(x):
        return mlp.down(gelu(mlp.gate(x)) * mlp.up(x))

    for given, expected in zip(value_and_gradients(mlp, x), value_and_gradients(formula, x), strict=True):
        np.testing.assert_allclose(given, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
