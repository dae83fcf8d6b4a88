import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.ops.grouped import BLOCKS, IMPLEMENTATIONS, grouped, matrix_tile, sort_by_group, visit_blocks

E, K, N, R = 4, 6, 5, 150

# Sums in another order: the largest measured error is 2e-7 of the largest entry in float32. In bfloat16, where only the
# result is rounded, it is half of the distance of two numbers, 2e-3.
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 4e-3}

SIZES = {
    "no multiple of a block": (33, 64, 1, 52),
    "a block each": (32, 32, 32, 32),
    "empty groups": (0, 70, 0, 80),
    "one with everything": (0, 0, R, 0),
    "the last with everything": (0, 0, 0, R),
    "rows behind the last group": (10, 0, 40, 7),
    "nothing": (0, 0, 0, 0),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels for TPU are interpreted as plain JAX: `force_tpu_interpret_mode` runs on callbacks, which may wait for
    each other on a machine of few cores."""
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    for name in ("gmm", "tgmm"):
        monkeypatch.setattr(kernels, name, functools.partial(getattr(kernels, name), interpret=True))


ON_CPU = [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"]


def make(dtype=jnp.float32, k=K, n=N):
    """rows, weight and the direction of the gradient."""
    shapes = (R, k), (E, k, n), (R, n)
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


def naive(rows, weight, sizes, direction):
    """The product and both gradients, group by group, in float64."""
    rows, weight, direction = (np.asarray(x, np.float64) for x in (rows, weight, direction))
    out, to_rows, to_weight = (np.zeros_like(x) for x in (direction, rows, weight))
    ends = np.cumsum(sizes)
    for group, (start, stop) in enumerate(zip(ends - sizes, ends, strict=True)):
        out[start:stop] = rows[start:stop] @ weight[group]
        to_rows[start:stop] = direction[start:stop] @ weight[group].T
        to_weight[group] = rows[start:stop].T @ direction[start:stop]
    return out, to_rows, to_weight


@functools.partial(jax.jit, static_argnames="implementation")
def compute(rows, weight, sizes, direction, *, implementation):
    out, pull = jax.vjp(lambda *x: grouped(*x, sizes, implementation=implementation), rows, weight)
    return out, *pull(direction)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
def test_each_row_meets_the_matrix_of_its_group_alone(dtype, implementation):
    rows, weight, direction = make(dtype)
    for name, sizes in SIZES.items():
        sizes = np.array(sizes, np.int32)
        given = compute(rows, weight, sizes, direction, implementation=implementation)
        for ours, plain in zip(given, naive(rows, weight, sizes, direction), strict=True):
            assert ours.dtype == dtype
            atol = TOLERANCE[dtype] * np.abs(plain).max()
            np.testing.assert_allclose(np.asarray(ours, np.float64), plain, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_what_stands_behind_the_last_group_is_never_read(implementation):
    rows, weight, direction = make()
    sizes = np.array((10, 0, 40, 7), np.int32)
    expected = compute(rows, weight, sizes, direction, implementation=implementation)
    bad = (x.at[57:].set(jnp.nan) for x in (rows, direction))
    given = compute(next(bad), weight, sizes, next(bad), implementation=implementation)
    for ours, clean in zip(given, expected, strict=True):
        np.testing.assert_array_equal(ours, clean)
    assert not np.any(given[0][57:])
    assert not np.any(given[1][57:])


@pytest.mark.parametrize("implementation", ["blocks", "megablox"])
def test_a_group_that_is_no_number_spoils_no_other(implementation):
    rows, weight, direction = make()
    sizes = np.array((33, 64, 1, 52), np.int32)
    expected = compute(rows, weight, sizes, direction, implementation=implementation)
    rows, weight = rows.at[33:97].set(jnp.nan), weight.at[1].set(jnp.nan)
    given = compute(rows, weight, sizes, direction, implementation=implementation)
    of_group = (np.arange(R) >= 33) & (np.arange(R) < 97)
    for ours, clean, is_spoilt in zip(given, expected, (of_group, of_group, np.arange(E) == 1), strict=True):
        assert np.all(np.isnan(np.asarray(ours)[is_spoilt]))
        np.testing.assert_array_equal(np.asarray(ours)[~is_spoilt], np.asarray(clean)[~is_spoilt])


def test_the_gradient_of_a_weight_is_summed_in_float32():
    # 1 + 4095 / 256 is 17 with four digits after the point; in bfloat16 a sum of 2 and 1/256 is 2 again.
    rows = jnp.ones((4096, 1), jnp.bfloat16).at[1:].set(1 / 256)
    for implementation in ("blocks", "ragged"):
        _, pull = jax.vjp(
            lambda weight, implementation=implementation: grouped(
                rows, weight, jnp.array([4096]), implementation=implementation
            ),
            jnp.ones((1, 1, 1), jnp.bfloat16),
        )
        (gradient,) = pull(jnp.ones((4096, 1), jnp.bfloat16))
        np.testing.assert_allclose(gradient.astype(jnp.float32), 17, rtol=4e-3)


def test_sorting_keeps_the_order_within_a_group_and_puts_strangers_last():
    order, sizes = sort_by_group(jnp.array([2, 0, -1, 2, 9, 0]), 3)
    np.testing.assert_array_equal(order, [1, 5, 0, 3, 2, 4])
    np.testing.assert_array_equal(sizes, [2, 0, 2])


# Blocks of 288, 256, 64 and 32 rows.
NUM_BLOCKS = {
    0: (0, 0, 0, 0),
    1: (0, 0, 0, 1),
    32: (0, 0, 0, 1),
    33: (0, 0, 1, 0),
    150: (0, 0, 2, 1),
    224: (0, 0, 3, 1),
    225: (0, 1, 0, 0),
    256: (0, 1, 0, 0),
    257: (1, 0, 0, 0),
    288: (1, 0, 0, 0),
    289: (0, 1, 1, 0),
    1000: (0, 4, 0, 0),
    1030: (1, 3, 0, 0),
}


@pytest.mark.parametrize("rows", NUM_BLOCKS)
def test_blocks_lie_side_by_side_and_less_than_one_of_the_least_only_fills(rows):
    def count(at, block, carry):
        visited, blocks = carry
        return visited.at[at + jnp.arange(block)].add(1), blocks.at[(288, *BLOCKS).index(block)].add(1)

    nothing = jnp.zeros(rows + 5 + BLOCKS[-1], jnp.int32), jnp.zeros(4, jnp.int32)
    visited, blocks = visit_blocks(jnp.int32(5), jnp.int32(5 + rows), count, nothing, num_rows=rows)
    stop = 5 + -(-rows // BLOCKS[-1]) * BLOCKS[-1]
    np.testing.assert_array_equal(visited, (np.arange(len(visited)) >= 5) & (np.arange(len(visited)) < stop))
    np.testing.assert_array_equal(blocks, NUM_BLOCKS[rows])


def test_tiles_stay_whole_in_one_axis_fit_and_waste_little():
    assert matrix_tile(2816, 1408, 2) == (2816, 768)  # gate and up of 26B-A4B
    assert matrix_tile(704, 2816, 2) == (704, 2816)
