"""Products with matrices, and a kind of matrix that the package does not know: a low-rank pair, added from outside."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.layers import Linear
from gemma4_jax.model import Gemma4
from gemma4_jax.ops.matmul import Matrix, StoredMatrix, contract, take, value
from gemma4_jax.sharding import make_mesh, param_shardings
from tests.hf import samples
from tests.test_model import DOCUMENTS, SMALL, batch_of

RANK, SCALE = 2, 0.5

TEXT = dataclasses.replace(SMALL, vision=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankPair(StoredMatrix):
    """base + scale * a b, which is never made: x meets a, and what comes of it b."""

    base: Matrix
    a: jax.Array  # [*inputs, R]
    b: jax.Array  # [R, *outputs]
    scale: float = dataclasses.field(metadata={"static": True})

    def value(self) -> jax.Array:
        return value(self.base) + self.scale * jnp.tensordot(self.a, self.b, axes=1)

    def contract(self, x: jax.Array, num_inputs: int) -> jax.Array:
        return contract(x, self.base, num_inputs) + self.scale * contract(contract(x, self.a, num_inputs), self.b, 1)


class LowRankAdapter(nnx.Module):
    """The trained part of the pair, beside the kernel of a Linear."""

    def __init__(self, key: jax.Array, linear: Linear):
        kernel, axes = linear.kernel.get_value(), linear.kernel.get_metadata()["axes"]
        layers = kernel.shape[: kernel.ndim - len(axes)]  # a stack has one axis more than it names
        own = kernel.shape[len(layers) :]
        inputs, outputs = own[: linear.num_inputs], own[linear.num_inputs :]
        a_key, b_key = jax.random.split(key)
        a = jax.random.normal(a_key, (*layers, *inputs, RANK)) * math.prod(inputs) ** -0.5
        self.a = nnx.Param(a, axes=(*axes[: linear.num_inputs], None))
        self.b = nnx.Param(jax.random.normal(b_key, (*layers, RANK, *outputs)), axes=(None, *axes[linear.num_inputs :]))

    def __call__(self, base: Matrix) -> Matrix:
        return LowRankPair(base, self.a.get_value(), self.b.get_value(), SCALE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(StoredMatrix):
    """Whole numbers times one scale: a kind that says its values, and nothing else."""

    codes: jax.Array
    scale: jax.Array

    def value(self) -> jax.Array:
        return self.codes.astype(jnp.float32) * self.scale


def adapt(model: Gemma4) -> None:
    """A low-rank adapter on every Linear."""
    linears = [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    for i, linear in enumerate(linears):
        linear.kernel_adapter = LowRankAdapter(jax.random.key(i), linear)


def is_adapter(path: tuple, _: object) -> bool:
    return "kernel_adapter" in path


def values_of(state: nnx.State) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("context", [1, 2])
def test_the_last_axes_of_x_meet_the_first_of_the_matrix_in_the_dtype_of_x(context):
    x, matrix = normal(0, 2, 4, 3, 5), normal(1, 3, 5, 6, 7)
    with jax.set_mesh(make_mesh({"context": context, "data": -1})):
        given = jax.jit(contract, static_argnums=2)(x, matrix, 2)
        assert contract(x.astype(jnp.bfloat16), matrix, 2).dtype == jnp.bfloat16
    # float32 sums in another order: the largest measured error is 5e-7 of the largest entry.
    np.testing.assert_allclose(given, jnp.einsum("btij,ijkl->btkl", x, matrix), rtol=0, atol=1e-5)


def test_rows_of_a_table_come_in_the_dtype_that_is_asked_for():
    table, ids = normal(0, 6, 2, 3), jnp.array([[5, 0], [1, 5]])
    np.testing.assert_array_equal(take(table, ids, jnp.bfloat16), table.astype(jnp.bfloat16)[ids])


def test_a_matrix_that_says_its_values_and_nothing_else_can_do_everything():
    matrix = Int8(jnp.round(20 * normal(0, 3, 4, 5)).astype(jnp.int8), jnp.float32(0.05))
    dense, x, ids = matrix.value(), normal(1, 6, 4), jnp.array([2, 0])
    np.testing.assert_array_equal(value(matrix), dense)
    np.testing.assert_array_equal(contract(x[:, :3], matrix, 1), contract(x[:, :3], dense, 1))
    np.testing.assert_array_equal(take(matrix, ids, jnp.float32), take(dense, ids, jnp.float32))


@pytest.fixture(scope="module")
def base():
    return samples.model(TEXT, samples.lively_weights(TEXT))


@pytest.fixture(scope="module")
def rows():
    return batch_of([[DOCUMENTS[0]]])


@pytest.fixture(scope="module")
def adapted(base):
    model = nnx.clone(base)
    adapt(model)
    return model


def test_pairs_move_no_parameter_of_the_model(base, adapted):
    _, adapters, rest = nnx.split(adapted, is_adapter, ...)
    before, after = values_of(nnx.state(base)), values_of(rest)
    assert before.keys() == after.keys()
    for path, expected in before.items():
        np.testing.assert_array_equal(after[path], expected, err_msg=path)
    kernels = {path for path in before if path.endswith(".kernel") and ".router." not in path}
    assert values_of(adapters).keys() == {f"{path}_adapter.{factor}" for path in kernels for factor in "ab"}


def merged(base: nnx.State, adapters: nnx.State) -> nnx.State:
    """The base with every adapter's product added, by hand."""
    factors = values_of(adapters)

    def add(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name, kernel = f"{'.'.join(map(str, path))}_adapter", variable.get_value()
        if f"{name}.a" not in factors:
            return variable
        is_stacked = kernel.ndim > len(variable.get_metadata()["axes"])
        product = jax.vmap(_product) if is_stacked else _product
        return variable.replace(kernel + SCALE * product(factors[f"{name}.a"], factors[f"{name}.b"]))

    return nnx.map_state(add, base)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.tensordot(a, b, axes=1)


def test_a_model_of_pairs_is_the_model_of_their_sums_and_so_are_its_gradients(base, adapted, rows):
    """Through stacks, scans and jit. The base is no argument of the gradient."""
    graphdef, adapters, frozen = nnx.split(adapted, is_adapter, ...)
    base_graphdef, base_state = nnx.split(base)

    def by_pairs(adapters: nnx.State) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, adapters, frozen)(rows)
        return jnp.mean(jnp.sin(logits)), logits

    def by_sums(adapters: nnx.State) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(base_graphdef, merged(base_state, adapters))(rows)
        return jnp.mean(jnp.sin(logits)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(by_pairs, has_aux=True))(adapters)
    (_, expected), expected_gradients = jax.jit(jax.value_and_grad(by_sums, has_aux=True))(adapters)
    scale = np.abs(expected).max()
    assert np.abs(expected - samples.logits(base, rows)).max() > 0.1 * scale
    # float32 sums in another order: the largest measured error is 2e-6 of the largest logit.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
    given = values_of(gradients)
    for path, gradient in values_of(expected_gradients).items():
        assert np.abs(gradient).max() > 0, path
        # The largest measured error is 5e-5 of the largest entry.
        np.testing.assert_allclose(given[path], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=path)


def test_adapters_are_spread_as_what_they_adapt(adapted):
    shardings = values_of(param_shardings(nnx.state(adapted), make_mesh({"fsdp": 4, "tensor": 2})))
    q = "decoder.own.layers.0.attention.q.kernel"
    assert tuple(shardings[q].spec) == (None, "fsdp", "tensor", None)
    assert tuple(shardings[f"{q}_adapter.a"].spec) == (None, "fsdp", None)
    assert tuple(shardings[f"{q}_adapter.b"].spec) == (None, None, "tensor", None)


def test_a_matrix_of_another_kind_may_be_the_value_of_a_parameter_and_have_an_adapter():
    linear = Linear(nnx.Rngs(0), {"embed": 4}, {"mlp": 6}, param_dtype=jnp.float32)
    linear.kernel_adapter = LowRankAdapter(jax.random.key(0), linear)
    a, b = linear.kernel_adapter.a.get_value(), linear.kernel_adapter.b.get_value()
    codes, x = jnp.round(20 * normal(0, 4, 6)).astype(jnp.int8), normal(1, 3, 4)
    linear.kernel.set_value(Int8(codes, jnp.float32(0.05)))
    np.testing.assert_allclose(nnx.jit(lambda linear: linear(x))(linear), x @ (0.05 * codes + SCALE * a @ b), atol=1e-5)
