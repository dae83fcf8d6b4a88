import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_jax.ops.lookup import look_up
from gemma4_jax.sharding import make_mesh
from tests.ops.test_vocabulary_parallel import MESHES, named

VOCAB, LAYERS, WIDTH = 32, 3, 16
TABLE = jax.random.normal(jax.random.key(0), (VOCAB, LAYERS, WIDTH))
# Some ids more often than others, some never, on every device.
IDS = jnp.array(np.random.default_rng(0).zipf(1.3, (8, 24)) % (VOCAB - 4), jnp.int32)
DIRECTION = jax.random.normal(jax.random.key(1), (*IDS.shape, LAYERS, WIDTH))


def gradient(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.grad(lambda table: jnp.sum(look_up(table, ids, jnp.float32) * DIRECTION))(table)


@pytest.mark.parametrize("sizes", MESHES, ids=named)
def test_rows_and_gradient_are_those_of_a_plain_gather_on_every_mesh_axis(sizes):
    expected = gradient(TABLE, IDS)
    with jax.set_mesh(make_mesh(sizes)):
        np.testing.assert_array_equal(jax.jit(look_up, static_argnums=2)(TABLE, IDS, jnp.float32), TABLE[IDS])
        given = jax.jit(gradient)(TABLE, IDS)
    # float32 sums in another order: the largest measured error is 1e-6.
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(given[VOCAB - 4 :], 0)


def test_a_matrix_is_looked_up_as_any_table():
    with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        given = jax.jit(look_up, static_argnums=2)(TABLE[:, 0], IDS, jnp.bfloat16)
    np.testing.assert_array_equal(given, TABLE[:, 0].astype(jnp.bfloat16)[IDS])


def test_no_device_ever_has_the_gradient_of_more_than_its_part():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    table, ids = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in ((TABLE, P("tensor", None, "fsdp")), (IDS, P("fsdp")))
    )
    with jax.set_mesh(mesh):
        program = jax.jit(gradient, out_shardings=table.sharding).lower(table, ids).compile().as_text()
    part = VOCAB // 2, LAYERS * WIDTH // 4
    assert f"f32[{part[0]},{part[1]}]" in program
    for rows, channels in ((VOCAB, part[1]), (part[0], LAYERS * WIDTH), (VOCAB, LAYERS * WIDTH)):
        assert f"f32[{rows},{channels}]" not in program
        assert f"f32[{rows},{LAYERS},{channels // LAYERS}]" not in program


def test_a_gradient_in_bfloat16_is_added_up_in_float32():
    ids, table = jnp.ones((8, 64), jnp.int32), TABLE[:, 0]
    with jax.set_mesh(make_mesh({"fsdp": 8})):
        given = jax.jit(jax.grad(lambda table: jnp.sum(look_up(table, ids, jnp.bfloat16))))(table)
    # In bfloat16, 256 + 1 is 256.
    np.testing.assert_array_equal(given[1], ids.size)


def test_ids_that_the_mesh_does_not_divide_are_looked_up_all_the_same():
    with jax.set_mesh(make_mesh({"fsdp": 8})):
        np.testing.assert_array_equal(jax.jit(look_up, static_argnums=2)(TABLE, IDS[:3], jnp.float32), TABLE[IDS[:3]])
