import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_jax.ops import cross_entropy
from gemma4_jax.ops.cross_entropy import Head
from gemma4_jax.ops.vocabulary_parallel import total_log_prob
from gemma4_jax.sharding import BATCH_AXES, make_mesh

VOCAB, WIDTH = 96, 24
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = 2 * jax.random.normal(KEYS[0], (8, 32, WIDTH))
TABLE = jax.random.normal(KEYS[1], (VOCAB, WIDTH))
TARGETS = jax.random.randint(KEYS[2], HIDDEN.shape[:2], 0, VOCAB - 1)
WEIGHTS = jax.random.uniform(KEYS[3], HIDDEN.shape[:2]) * (jnp.arange(32) % 3 > 0)

MESHES = [
    {"fsdp": 8},
    {"tensor": 8},
    {"context": 8},
    {"data": 8},
    {"expert": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "context": 2},
]


def named(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def loss_and_gradients(function, hidden, table, weights, *, cap=3.0, chunk=8, z_weight=0.0):
    def loss(hidden, table, weights):
        total, z_loss = function(hidden, Head(table, cap), TARGETS, weights, chunk=chunk, z_weight=z_weight)
        return 0.5 * total, z_loss

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(hidden, table, weights)


def check(given, expected):
    for value, other in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        # float32 sums in another order: the largest measured error is 1e-6 of the largest entry.
        np.testing.assert_allclose(value, other, rtol=0, atol=5e-6 * np.abs(other).max())


@pytest.mark.parametrize("options", [{"cap": 0.0}, {"cap": 3.0, "z_weight": 0.3}], ids=str)
@pytest.mark.parametrize("sizes", MESHES, ids=named)
def test_loss_and_gradients_are_those_of_one_device_on_every_mesh_axis(sizes, options):
    expected = loss_and_gradients(cross_entropy.total_log_prob, HIDDEN, TABLE, WEIGHTS, **options)
    with jax.set_mesh(make_mesh(sizes)):
        given = jax.jit(lambda *inputs: loss_and_gradients(total_log_prob, *inputs, **options))(HIDDEN, TABLE, WEIGHTS)
    check(given, expected)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}], ids=named)
def test_gradients_in_bfloat16_are_divided_by_the_weight_of_all_tokens_in_float32(sizes):
    """1 / 37 in bfloat16 is too small by 0.2 %, and every gradient of the decoder would be."""
    hidden = HIDDEN.astype(jnp.bfloat16)

    def gradient(hidden, scale):
        return jax.grad(lambda hidden: scale * total_log_prob(hidden, Head(TABLE, 3.0), TARGETS, WEIGHTS, chunk=8)[0])(
            hidden
        )

    with jax.set_mesh(make_mesh(sizes)) if sizes else contextlib.nullcontext():
        whole, divided = (jax.jit(gradient)(hidden, scale) for scale in (1.0, np.float32(1 / 37)))
    assert divided.dtype == jnp.bfloat16
    np.testing.assert_array_equal(divided, (whole.astype(jnp.float32) * np.float32(1 / 37)).astype(jnp.bfloat16))


def test_what_the_mesh_does_not_divide_is_computed_all_the_same():
    expected = loss_and_gradients(cross_entropy.total_log_prob, HIDDEN, TABLE[:-1], WEIGHTS)
    with jax.set_mesh(make_mesh({"fsdp": 8})):
        given = jax.jit(lambda *inputs: loss_and_gradients(total_log_prob, *inputs))(HIDDEN, TABLE[:-1], WEIGHTS)
    check(given, expected)


def test_no_device_ever_has_more_than_its_part_of_the_table_or_of_its_gradient():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    specs = P(BATCH_AXES), P("tensor", "fsdp"), P(BATCH_AXES)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    inputs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip((HIDDEN, TABLE, WEIGHTS), shardings, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(
            lambda *inputs: loss_and_gradients(total_log_prob, *inputs), out_shardings=(None, tuple(shardings))
        )
        program = compiled.lower(*inputs).compile().as_text()
    assert f"f32[{VOCAB // 4},{WIDTH}]" in program
    assert f"f32[{VOCAB // 2},{WIDTH}]" not in program
    assert f"f32[{VOCAB},{WIDTH}]" not in program
