import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.ops.expert_parallel import IMPLEMENTATIONS, apply_experts, choose
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import make_mesh

B, T, D, E, C, F = 8, 6, 5, 8, 2, 4

# float32 sums in another order: the largest measured error is 6e-7 of the largest entry.
TOLERANCE = 3e-6


@pytest.fixture
def inputs():
    """x, choices, weights, gate_up, down; the load is uneven and some experts have no token at all."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, gate_up, down = (
        jax.random.normal(key, shape) for key, shape in zip(keys, ((B, T, D), (E, D, 2, F), (E, F, D)), strict=False)
    )
    preference = jnp.array([3.0, 0, 0, -9, 2, -9, 0, 0])
    _, choices = jax.lax.top_k(jax.random.gumbel(keys[3], (B, T, E)) + preference, C)
    assert len(set(np.bincount(choices.ravel(), minlength=E))) > 3
    assert np.bincount(choices.ravel(), minlength=E)[3] == 0
    return x, choices, jax.random.uniform(keys[4], (B, T, C)), gate_up, down


def naive(x, choices, weights, gate_up, down):
    """A copy of the weights of its expert for every choice of every token."""
    gate, up = (jnp.einsum("btd,btcdf->btcf", x, gate_up[choices][..., half, :]) for half in (0, 1))
    out = jnp.einsum("btcf,btcfd->btcd", jax.nn.gelu(gate, approximate=True) * up, down[choices])
    return jnp.sum(out * weights[..., None], axis=2)


def value_and_gradients(function, inputs):
    """The output, and the gradients for x, weights, gate_up and down of a scalar of it."""
    x, choices, weights, gate_up, down = inputs
    direction = jax.random.normal(jax.random.key(9), x.shape)

    @jax.jit
    def compute(*differentiated):
        def scalar(x, weights, gate_up, down):
            out = function(x, choices, weights, gate_up, down)
            return jnp.sum(out * direction), out

        (_, out), gradients = jax.value_and_grad(scalar, argnums=(0, 1, 2, 3), has_aux=True)(*differentiated)
        return out, *gradients

    return compute(x, weights, gate_up, down)


def assert_close(given, expected):
    for ours, plain in zip(given, expected, strict=True):
        assert np.abs(plain).max() > 0
        np.testing.assert_allclose(ours, plain, rtol=0, atol=TOLERANCE * np.abs(plain).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_token_reaches_every_expert_that_it_chose(implementation, inputs):
    def experts(*inputs):
        return apply_experts(*inputs, implementation=implementation)

    assert_close(value_and_gradients(experts, inputs), value_and_gradients(naive, inputs))


def test_what_is_auto_goes_by_the_platform_and_what_does_not_exist_is_refused():
    assert [choose(KernelPolicy(platform)) for platform in ("cpu", "gpu", "tpu")] == ["dense", "ragged", "ragged"]
    assert choose(KernelPolicy(experts="ragged")) == "ragged"
    with pytest.raises(InputError, match="experts='fast' is not possible: it must be auto, dense or ragged"):
        choose(KernelPolicy(experts="fast"))


@pytest.mark.parametrize(("implementation", "is_grouped"), [("dense", False), ("ragged", True)])
def test_the_implementation_that_is_named_is_run(implementation, is_grouped, inputs):
    program = jax.make_jaxpr(lambda *inputs: apply_experts(*inputs, implementation=implementation))(*inputs)
    assert ("ragged_dot" in str(program)) == is_grouped


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_dropped_when_all_choose_one_expert(implementation, inputs):
    x, choices, weights, gate_up, down = inputs
    inputs = x, jnp.zeros_like(choices) + jnp.array([5, 2]), weights, gate_up, down
    np.testing.assert_allclose(apply_experts(*inputs, implementation=implementation), naive(*inputs), atol=1e-5)


MESHES = [{"data": 2, "expert": 4}, {"expert": 8}, {"data": 2, "expert": 2, "tensor": 2}, {"expert": 4, "context": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_spread_over_a_mesh_are_those_of_one_device(implementation, sizes, inputs):
    def experts(*inputs):
        return apply_experts(*inputs, implementation=implementation)

    alone = value_and_gradients(experts, inputs)
    with jax.set_mesh(make_mesh(sizes)):
        spread = value_and_gradients(experts, inputs)
    assert_close(spread, alone)
