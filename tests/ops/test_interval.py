"""The TPU kernel, interpreted: what it computes, not what it costs."""

import functools
from collections.abc import Callable
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from gemma4_jax.ops.attention import Shape, attend, choose, interval
from gemma4_jax.ops.attention.spans import Spans, document_spans, member_spans
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import make_mesh

# float32 sums in another order, relative to the largest entry: the largest measured error is 3e-6, and that of
# `blockwise`. The gradient of a query that sees one key is 0, as the difference of two sums over 512 channels.
TOLERANCE = 6e-6
LENGTH = 304


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel as plain JAX, and rows of several blocks that are quick to compute.

    The interpreter of `force_tpu_interpret_mode` knows more of a TPU, but runs on callbacks, which on a machine of few
    cores can wait for each other for ever.
    """
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(interval, "ROWS", 128)
    monkeypatch.setattr(interval, "KEYS", 128)


def layout(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Segments, positions and images of two rows: documents of many lengths, across the borders of blocks, padding."""
    rng = np.random.default_rng(seed)
    segments, positions, images = np.zeros((3, 2, LENGTH), np.int32)
    for b in range(2):
        start, document = 0, 0
        while start < LENGTH - 20:
            size = min(int(rng.integers(1, 200)), LENGTH - 10 - start)
            document += 1
            segments[b, start : start + size] = document
            positions[b, start : start + size] = np.arange(size)
            first = start + size // 4
            images[b, first : first + size // 2] = document
            start += size
    return jnp.asarray(segments), jnp.asarray(positions), jnp.asarray(images)


def text(seed: int, window: int | None, *, has_images: bool = False) -> Spans:
    _, positions, images = layout(seed)
    index = jnp.broadcast_to(jnp.arange(LENGTH), positions.shape)
    return document_spans(positions, index, window=window, image_ids=images if has_images else None)


# (spans, keys)
CASES: dict[str, tuple[Callable[[], Spans], int]] = {
    "sliding": (lambda: text(0, 40, has_images=True), LENGTH),
    "global": (lambda: text(1, None), LENGTH),
    "window": (lambda: text(4, 40), LENGTH),
    "heard": (lambda: member_spans(layout(5)[0], back=11, ahead=7), LENGTH),
    "patches": (lambda: member_spans(layout(2)[0]), LENGTH),
    "cache": (lambda: text(3, 100), 450),
    "short": (lambda: document_spans(*(jnp.arange(160)[None] % size for size in (100, 160))), 160),
}


def random(*shape: int, seed: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@functools.cache
def outputs_and_gradients(name: str, case: str, heads: tuple[int, int, int], dtype: jnp.dtype) -> list[np.ndarray]:
    """Heads of queries, of keys, and their width."""
    make_spans, num_keys = CASES[case]
    spans = make_spans()
    num_heads, num_kv_heads, head_dim = heads
    q, direction = (random(*spans.start.shape, num_heads, head_dim, seed=seed) for seed in (0, 3))
    q = (q * head_dim**-0.5).astype(dtype)
    k, v = (random(len(q), num_keys, num_kv_heads, head_dim, seed=seed, dtype=dtype) for seed in (1, 2))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, spans, implementation=name)
        return jnp.sum(out.astype(jnp.float32) * direction), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_close(given: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for ours, plain in zip(given, expected, strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(ours, plain, atol=tolerance * np.abs(plain).max())


# Groups of two heads, a group of its own for each head as in the vision tower, and one for all as in E2B.
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("case", "heads", "kv_heads", "head_dim"),
    [*((case, 4, 2, 8) for case in CASES), ("patches", 2, 2, 72), ("sliding", 2, 1, 256), ("short", 2, 1, 512)],
)
def test_it_equals_the_reference_forward_and_backward(case, heads, kv_heads, head_dim):
    expected = outputs_and_gradients("reference", case, (heads, kv_heads, head_dim), jnp.float32)
    assert_close(outputs_and_gradients("interval", case, (heads, kv_heads, head_dim), jnp.float32), expected, TOLERANCE)


@pytest.mark.usefixtures("interpreted")
def test_in_bfloat16_it_is_as_near_as_the_reference():
    """Which is 1.0e-2 of the largest entry from float32 at most."""
    expected = outputs_and_gradients("reference", "sliding", (4, 2, 8), jnp.float32)
    assert_close(outputs_and_gradients("interval", "sliding", (4, 2, 8), jnp.bfloat16), expected, 3e-2)


@pytest.mark.usefixtures("interpreted")
def test_blocks_that_nobody_sees_are_not_visited():
    """The rest of the row is not a number, and does not matter."""
    ids = jnp.asarray(np.repeat([1, 2], [130, 254])[None])
    q, k, v = (random(1, 384, 1, 8, seed=seed) for seed in range(3))
    broken = jnp.where((jnp.arange(384) >= 256)[:, None, None], jnp.nan, v)
    given = jax.jit(functools.partial(attend, implementation="interval"))(q, k, broken, member_spans(ids))
    assert np.isfinite(given[:, :128]).all()
    assert np.isnan(given[:, 130:]).all()


@pytest.mark.usefixtures("interpreted")
def test_keys_that_nobody_sees_have_no_gradient():
    """Of a cache that is not full, whole blocks."""
    q, k = random(1, 130, 2, 8, seed=0), random(1, 500, 1, 8, seed=1)
    spans = document_spans(*(jnp.arange(130)[None] for _ in range(2)))
    gradient = jax.jit(jax.grad(lambda kv: jnp.sum(attend(q, kv, kv, spans, implementation="interval") ** 2)))(k)
    assert np.all(gradient[:, 130:] == 0)
    assert np.all(np.abs(gradient[:, :130]).max(axis=-1) > 0)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "group", "back", "expected"),
    [
        (8192, 8192, 8, None, (128, 512)),  # E2B, global
        (8192, 8192, 8, 511, (128, 256)),  # E2B, sliding: three blocks of 256 instead of two of 512
        (8192, 8192, 2, 1023, (512, 512)),  # 31B, sliding
        (2520, 2520, 1, None, (1024, 512)),  # patches
        (200, 300, 2, None, (256, 384)),
    ],
)
def test_blocks_have_the_rows_of_all_heads_of_a_group(num_queries, num_keys, group, back, expected):
    assert interval.block_sizes(num_queries, num_keys, group, back) == expected


def test_on_tpu_it_is_what_auto_takes(caplog):
    caplog.set_level("INFO")
    tpu = KernelPolicy("tpu")
    assert choose(tpu, Shape(8192, 8192, 256, back=511, ahead=0)) == "interval"
    assert choose(tpu, Shape(8192, 8192, 512)) == "interval"
    assert choose(tpu, Shape(2520, 2520, 72)) == "interval"
    assert choose(tpu, Shape(1, 8191, 512)) == "reference"
    assert "not interval: it has fewer queries than a block, which is 128" in caplog.text
    assert choose(tpu, Shape(8190, 8190, 640)) == "blockwise"
    assert "not interval: its heads are wider than 512" in caplog.text
    assert choose(KernelPolicy(attention="interval"), Shape(8192, 8192, 256)) == "blockwise"
    assert caplog.records[-1].levelname == "WARNING"
    assert "not interval: it is written for TPUs" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("mesh", [{}, {"context": 4, "fsdp": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "back", "ahead"),
    [(8, 1, 256, 511, 0), (8, 1, 512, None, 0), (32, 16, 256, 1023, None), (16, 16, 72, None, None)],
)
def test_it_lowers_for_tpus_as_three_kernels(heads, kv_heads, head_dim, back, ahead, mesh):
    """Layers of E2B, the sliding ones of 31B, and its patches; whether blocks fit is what benchmarks say."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
        return jnp.sum(attend(q, k, v, spans, implementation="interval").astype(jnp.float32))

    queries, keys = (jax.ShapeDtypeStruct((2, 2520, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads))
    bound = jax.ShapeDtypeStruct((2, 2520), jnp.int32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    with jax.set_mesh(make_mesh(mesh)) if mesh else nullcontext():
        exported = jax.export.export(gradient, platforms=["tpu"])(queries, keys, keys, Spans(bound, bound, back, ahead))
    module = exported.mlir_module()
    names = ("forward_kernel", "query_gradient_kernel", "key_gradients_kernel")
    assert module.count("@tpu_custom_call") == 3
    assert all(f'kernel_name = "{name}"' in module for name in names)
