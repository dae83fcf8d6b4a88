"""tokamax's kernels for GPUs, as far as a machine without one can tell; skipped where tokamax is not installed."""

import jax
import jax.numpy as jnp
import pytest

from gemma4_jax.ops.attention import attend
from gemma4_jax.ops.attention.mosaic_gpu import mask_of
from gemma4_jax.ops.attention.spans import Spans
from tests.ops.test_attention import TOLERANCE, assert_close, layout, random, spans_of

pytest.importorskip("tokamax")

LENGTH = 304
CASES = {
    "sliding": lambda: spans_of(*layout(LENGTH, 0), 40),
    "global": lambda: spans_of(layout(LENGTH, 1)[0], None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_its_masks_mean_what_spans_do(case):
    spans = CASES[case]()
    assert (mask_of(spans).as_array(LENGTH, LENGTH)[:, 0] == spans.mask(LENGTH)).all()


@pytest.mark.parametrize("case", CASES)
def test_with_tokamax_s_plain_computation_for_the_kernel_it_equals_the_reference(case, monkeypatch):
    """What is around the kernel: masks, the scale, groups of heads, and rows that fill no whole number of blocks."""
    from tokamax._src.ops.attention import base, pallas_mosaic_gpu

    spans = CASES[case]()
    q, direction = random(2, LENGTH, 4, 8, seed=0), random(2, LENGTH, 4, 8, seed=3)
    k, v = (random(2, LENGTH, 2, 8, seed=seed) for seed in (1, 2))

    def outputs_and_gradients(name: str) -> list[jax.Array]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attend(q, k, v, spans, implementation=name)
            return jnp.sum(out * direction), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [out, *gradients]

    monkeypatch.setattr(pallas_mosaic_gpu, "PallasMosaicGpuFlashAttention", base.DotProductAttention)
    assert_close(outputs_and_gradients("mosaic_gpu"), outputs_and_gradients("reference"), TOLERANCE)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "back", "ahead"), [(4096, 8, 1, 511, 0), (4100, 16, 8, 1023, None)]
)
def test_it_lowers_for_hopper_as_three_kernels_without_an_array_of_scores(
    length, heads, kv_heads, back, ahead, monkeypatch
):
    """Sliding layers of E2B and 26B, as if there was a GPU; whether they are right and fast there is not known."""
    from tokamax._src import gpu_utils

    for name, value in {"is_sm90": True, "is_sm100": False, "has_mosaic_gpu_support": True}.items():
        monkeypatch.setattr(gpu_utils, name, lambda *_, value=value: value)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
        return jnp.sum(attend(q, k, v, spans, implementation="mosaic_gpu").astype(jnp.float32))

    queries, keys = (jax.ShapeDtypeStruct((2, length, n, 256), jnp.bfloat16) for n in (heads, kv_heads))
    bound = jax.ShapeDtypeStruct((2, length), jnp.int32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(queries, keys, keys, Spans(bound, bound, back, ahead))
    module = gradient.lower(lowering_platforms=("cuda",)).as_text()
    assert module.count("custom_call @mosaic_gpu") == 3
    whole = -(-length // 128) * 128
    assert not any(f"{rows}x{keys}x" in module for rows in (length, whole) for keys in (length, whole))
