import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.ops.gather import invert_rows, move_rows

SOURCES = jnp.array([[3, -1, 0, 4, -1, -1, -1], [2, 1, 0, 5, 4, 3, -1]])
NUM_ROWS = 6


def plain(x: jax.Array) -> jax.Array:
    """The same with jnp alone, whose gradient is a scatter-add."""
    moved = jnp.stack([row[index] for row, index in zip(x, jnp.maximum(SOURCES, 0), strict=True)])
    return moved * (SOURCES >= 0)[..., None, None]


def moved(x: jax.Array) -> jax.Array:
    return move_rows(x, SOURCES, invert_rows(SOURCES, NUM_ROWS))


def test_the_inverse_of_an_index():
    expected = [[2, -1, -1, 0, 3, -1], [2, 1, 0, 5, 4, 3]]
    np.testing.assert_array_equal(invert_rows(SOURCES, NUM_ROWS), expected)


def test_rows_are_moved_and_the_rest_is_zero():
    x = jax.random.normal(jax.random.key(0), (2, NUM_ROWS, 3, 2))
    np.testing.assert_array_equal(moved(x), plain(x))
    np.testing.assert_array_equal(moved(x)[0, 1], 0)


def test_the_gradient_is_that_of_a_plain_gather():
    x, direction = (jax.random.normal(jax.random.key(i), (2, n, 3, 2)) for i, n in ((0, NUM_ROWS), (1, 7)))
    given, expected = (jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2 * direction))(x) for f in (moved, plain))
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(given, expected)


def test_there_and_back_again():
    x = jax.random.normal(jax.random.key(0), (2, NUM_ROWS, 3))
    destinations = invert_rows(SOURCES, NUM_ROWS)
    back = move_rows(move_rows(x, SOURCES, destinations), destinations, SOURCES)
    np.testing.assert_array_equal(back, x * (destinations >= 0)[..., None])
