"""tokamax's grouped matmul for Hopper, as far as a machine without one can tell; skipped where it is not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma4_jax.errors import InputError
from gemma4_jax.ops.expert_parallel import apply_experts
from gemma4_jax.ops.grouped import grouped
from gemma4_jax.sharding import make_mesh
from tests.ops import test_grouped

pytest.importorskip("tokamax")

# Neither is a multiple of a step of the kernels, and the first has more than one.
K, N = 200, 70


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    from tokamax._src import gpu_utils

    for name, value in {"is_sm90": True, "is_sm100": False, "has_mosaic_gpu_support": True}.items():
        monkeypatch.setattr(gpu_utils, name, lambda *_, value=value: value)


class Interpretable:
    """Pallas for GPUs without what its interpreter lacks: matmuls of registers, and layouts of them."""

    def __getattr__(self, name):
        return getattr(plgpu, name)

    def broadcasted_iota(self, dtype, shape, dimension, *, layout):
        return plgpu.broadcasted_iota(dtype, shape, dimension)

    def wgmma_wait(self, n):
        pass  # it has not begun before it is done

    def wgmma(self, total, a, b):
        from tokamax._src.ops.ragged_dot.pallas_mosaic_gpu_common import tiled_swizzled_smem

        def from_memory(memory):
            memory[...] = a
            plgpu.wgmma(total, memory, b)

        if isinstance(a, jax.Array):
            pl.run_scoped(from_memory, tiled_swizzled_smem(a.shape, a.dtype))
        else:
            plgpu.wgmma(total, a, b)


@pytest.fixture
def compute(monkeypatch):
    """`test_grouped.compute`, by tokamax's kernels in Pallas' interpreter, which finds reads and writes outside."""
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu_kernel_sm90 as kernels

    monkeypatch.setattr(kernels, "plgpu", Interpretable())
    with force_gpu_interpret_mode():
        yield lambda *inputs: test_grouped.compute(*inputs, implementation="mosaic_gpu")


@pytest.mark.parametrize("case", test_grouped.SIZES)
def test_its_products_and_both_gradients_are_right(case, compute):
    rows, weight, direction = test_grouped.make(jnp.bfloat16, K, N)
    sizes = np.array(test_grouped.SIZES[case], np.int32)
    given = compute(rows, weight, sizes, direction)
    for ours, plain in zip(given, test_grouped.naive(rows, weight, sizes, direction), strict=True):
        assert ours.dtype == jnp.bfloat16
        atol = test_grouped.TOLERANCE[jnp.bfloat16] * np.abs(plain).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), plain, rtol=0, atol=atol)


def test_what_is_no_number_stays_in_its_group_and_is_not_seen_behind_the_last(compute):
    rows, weight, direction = test_grouped.make(jnp.bfloat16, K, N)
    sizes = np.array((10, 30, 0, 7), np.int32)
    expected = compute(rows, weight, sizes, direction)
    row = np.arange(len(rows))
    of_group = (row >= 10) & (row < 40)
    rows, direction = (jnp.where((of_group | (row >= 47))[:, None], jnp.nan, x) for x in (rows, direction))
    given = compute(rows, weight.at[1].set(jnp.nan), sizes, direction)
    for ours, clean, is_spoilt in zip(given, expected, (of_group, of_group, np.arange(4) == 1), strict=True):
        assert np.all(np.isnan(np.asarray(ours)[is_spoilt]))
        np.testing.assert_array_equal(np.asarray(ours)[~is_spoilt], np.asarray(clean)[~is_spoilt])


@pytest.mark.parametrize("devices", [1, 8])
def test_experts_of_26b_lower_for_hopper_as_its_kernels_alone(devices):
    """128 on one device, 16 on each of eight; whether the kernels are fast there is not known."""
    e, d, f, c, length = 128, 2816, 704, 8, 2048

    def loss(x, weights, choices, *matrices):
        out = apply_experts(x, choices, weights, *matrices, implementation="mosaic_gpu")
        return jnp.sum(out.astype(jnp.float32))

    shapes = (1, length, d), (1, length, c), (1, length, c), (e, d, 2, f), (e, f, d)
    dtypes = jnp.bfloat16, jnp.float32, jnp.int32, jnp.bfloat16, jnp.bfloat16
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with jax.set_mesh(make_mesh({"expert": devices}, jax.devices()[:devices])):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 3, 4))).trace(*inputs)
        module = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Two products forward and four backward, and the same again in the loop over what is more than a device's share.
    assert module.count("custom_call @mosaic_gpu") == (6 if devices == 1 else 12)
    assert not any(product in module for product in ("chlo.ragged_dot", "dot_general"))


@pytest.mark.parametrize(
    ("is_sm90", "dtype", "reason"), [(True, jnp.float32, "compute_dtype"), (False, jnp.bfloat16, "Hopper")]
)
def test_other_types_and_other_gpus_are_refused(is_sm90, dtype, reason, monkeypatch):
    from tokamax._src import gpu_utils

    monkeypatch.setattr(gpu_utils, "is_sm90", lambda: is_sm90)
    rows, weight, _ = test_grouped.make(dtype)
    with pytest.raises(InputError, match=rf"experts='mosaic_gpu' .*{reason}"):
        grouped(rows, weight, jnp.array([1, 2, 3, 4]), implementation="mosaic_gpu")
