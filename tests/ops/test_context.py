"""Rows spread over `context`: the order, what is exchanged, and attention as on one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gemma4_jax.batch import Batch, padding
from gemma4_jax.model import Gemma4
from gemma4_jax.ops.attention import IMPLEMENTATIONS, Shape, attend
from gemma4_jax.ops.attention.context import exchange_for, num_shards, swap_halves, whole_row, with_halo
from gemma4_jax.ops.attention.spans import Spans, document_spans, member_spans
from gemma4_jax.sharding import make_mesh
from gemma4_jax.sizes import SIZES
from tests.ops.test_attention import TOLERANCE, assert_close, layout, random, spans_of

LENGTH = 304
MESHES = [
    {"context": 2, "fsdp": 2, "tensor": 2},
    {"context": 2, "tensor": 4},
    {"context": 4, "expert": 2},
    {"context": 8},
]


def shards_of(x: jax.Array, shards: int) -> list[np.ndarray]:
    return np.split(np.asarray(x), shards, axis=1)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_every_shard_has_two_chunks_that_together_lie_as_far_into_the_row(shards):
    chunks = jnp.repeat(jnp.arange(2 * shards), 3)[None]
    with jax.set_mesh(make_mesh({"context": shards, "data": -1})):
        swapped = jax.jit(swap_halves)(jnp.repeat(chunks, 8, axis=0))
        again = jax.jit(swap_halves)(swapped)
    for i, shard in enumerate(shards_of(swapped, shards)):
        assert shard[0].tolist() == 3 * [2 * i] + 3 * [2 * (shards - 1 - i) + 1]
        assert shard[0].mean() == shards - 0.5
    np.testing.assert_array_equal(again[0], chunks[0])


def test_rows_without_two_chunks_for_each_shard_are_left_as_they_are():
    x = jnp.arange(24)[None]
    assert num_shards(24) == 1
    assert exchange_for(document_spans(x, x)) is None
    with jax.set_mesh(make_mesh({"context": 8})):
        assert num_shards(32) == 8
        assert num_shards(24) == 1
        np.testing.assert_array_equal(swap_halves(x), x)
        assert exchange_for(document_spans(x, x)) is None


@pytest.mark.parametrize(("back", "ahead"), [(0, 0), (3, 0), (12, 5), (40, 30)])
@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_a_halo_is_what_the_row_has_around_a_chunk(shards, back, ahead):
    """Chunks of 6 positions: less than one on either side, one, and several; and beyond the ends of the row."""
    size = 6
    x = random(2, 2 * shards * size, 3, seed=0)
    around = np.pad(x, ((0, 0), (back, ahead), (0, 0)))
    expected = [around[:, j * size : j * size + back + size + ahead] for j in range(2 * shards)]
    spread = P(None, "context")
    with jax.set_mesh(make_mesh({"context": shards}, jax.devices()[:shards])):
        halo = functools.partial(with_halo, back=back, ahead=ahead)
        given = jax.jit(jax.shard_map(halo, in_specs=spread, out_specs=spread))(swap_halves(x) if shards > 1 else x)
    for i, shard in enumerate(shards_of(given, shards)):
        first, second = shards_of(shard, 2)
        np.testing.assert_array_equal(first, expected[2 * i])
        np.testing.assert_array_equal(second, expected[2 * (shards - 1 - i) + 1])


def test_a_row_is_gathered_in_its_natural_order():
    x = random(2, 48, 3, seed=0)
    spread = P(None, "context")
    with jax.set_mesh(make_mesh({"context": 8})):
        given = jax.jit(jax.shard_map(whole_row, in_specs=spread, out_specs=spread))(swap_halves(x))
    for shard in shards_of(given, 8):
        np.testing.assert_array_equal(shard, x)


def images_of_layout() -> Spans:
    """Under a window, images of up to 75 soft tokens that see each other: across chunks, which are of 19 and more."""
    segments, images = layout(LENGTH, 0)
    return document_spans(
        jnp.where(segments > 0, jnp.arange(LENGTH) - _first_of(segments), 0),
        jnp.broadcast_to(jnp.arange(LENGTH), segments.shape),
        window=40,
        image_ids=jnp.asarray(images),
        image_tokens=75,
    )


def _first_of(segments: np.ndarray) -> np.ndarray:
    return np.array([[np.flatnonzero(row == segment)[0] for segment in row] for row in segments])


CASES = {
    "sliding with images": images_of_layout,
    "sliding, of no known bound": lambda: spans_of(*layout(LENGTH, 0), 40),
    "window": lambda: spans_of(layout(LENGTH, 4)[0], None, 40),
    "global": lambda: spans_of(layout(LENGTH, 1)[0], None, None),
    "members": lambda: member_spans(jnp.asarray(layout(LENGTH, 5)[0]), back=11, ahead=7),
}


@functools.cache
def outputs_and_gradients(name: str, case: str, mesh: tuple[tuple[str, int], ...] = ()) -> list[np.ndarray]:
    spans = CASES[case]()
    q, direction = random(2, LENGTH, 4, 8, seed=0), random(2, LENGTH, 4, 8, seed=3)
    k, v = (random(2, LENGTH, 2, 8, seed=seed) for seed in (1, 2))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not mesh:
            out = attend(q, k, v, spans, implementation=name)
        else:
            exchange = exchange_for(spans)
            assert exchange is not None
            assert (exchange.halo is None) == (case in {"global", "sliding, of no known bound"})
            k, v = (exchange(swap_halves(x)) for x in (k, v))
            out = attend(swap_halves(q), k, v, exchange.spans(spans), implementation=name, exchange=exchange)
            out = swap_halves(out)
        return jnp.sum(out * direction), out

    with jax.set_mesh(make_mesh(dict(mesh) if mesh else {"data": 1}, None if mesh else jax.devices()[:1])):
        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x) for x in (out, *gradients)]


def able_to(case: str) -> list[str]:
    spans = CASES[case]()
    shape = Shape(LENGTH, LENGTH, 8, spans.back, spans.ahead)
    return [name for name, known in IMPLEMENTATIONS.items() if known.reason_against(shape, "cpu") is None]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("name", "case"), [(name, case) for case in CASES for name in able_to(case)])
def test_attention_over_spread_rows_is_that_of_one_device(name, case, mesh):
    """Among them: halos of several chunks, and fewer heads of keys than shards of heads."""
    given = outputs_and_gradients(name, case, tuple(mesh.items()))
    assert_close(given, outputs_and_gradients("reference", case), TOLERANCE)


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "tensor"), [(6, 3, 2), (12, 6, 4), (4, 2, 4)])
def test_queries_of_one_shard_may_be_of_several_heads_of_keys(num_heads, num_kv_heads, tensor, context):
    """Three heads of two queries on two shards: the first has both of head 0 and one of head 1."""
    q, direction = random(2, 32, num_heads, 4, seed=0), random(2, 32, num_heads, 4, seed=3)
    k, v = (random(2, 32, num_kv_heads, 4, seed=seed) for seed in (1, 2))
    index = jnp.broadcast_to(jnp.arange(32), (2, 32))
    spans = document_spans(index, index)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        exchange = exchange_for(spans)
        if exchange is None:
            out = attend(q, k, v, spans, implementation="reference")
        else:
            k, v = (exchange(swap_halves(x)) for x in (k, v))
            seen = exchange.spans(spans)
            out = swap_halves(attend(swap_halves(q), k, v, seen, implementation="reference", exchange=exchange))
        return jnp.sum(out * direction), out

    compute = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    expected = jax.tree.leaves(compute(q, k, v))
    with jax.set_mesh(make_mesh({"context": context, "tensor": tensor}, jax.devices()[: context * tensor])):
        assert_close(jax.tree.leaves(jax.jit(compute)(q, k, v)), expected, TOLERANCE)


def test_what_is_exchanged_has_the_type_of_activations_and_so_have_gradients():
    index = jnp.arange(64)[None]
    k = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.bfloat16)

    def loss(k: jax.Array, spans: Spans) -> jax.Array:
        exchange = exchange_for(spans)
        assert exchange is not None
        return jnp.sum(exchange(k).astype(jnp.float32) ** 2)

    for window, operations in ((None, ["all_gather", "reduce_scatter"]), (5, ["collective_permute"])):
        spans = document_spans(index, index, window=window)
        with jax.set_mesh(make_mesh({"context": 8})):
            lines = jax.jit(jax.grad(loss)).lower(k, spans).as_text().splitlines()
        for operation in operations:
            # The type of a reduction stands behind its body.
            found = [i for i, line in enumerate(lines) if f"stablehlo.{operation}" in line]
            assert found
            assert all("bf16" in "".join(lines[i : i + 5]) and "xf32" not in lines[i] for i in found)


def test_keys_that_are_values_are_gathered_once_and_shared_ones_once_for_all_layers():
    """The tiny model has a global layer in which K = V, and one that shares its keys and values; two that slide."""
    config = SIZES["tiny"]()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_experts=0))  # which gather tokens
    model = nnx.eval_shape(lambda: Gemma4(config, nnx.Rngs(0)))
    sizes = {"batch": 1, "length": 512, "patches": 0, "patch": 48, "frames": 0, "mel": 1}
    batch = Batch(**padding(sizes))
    with jax.set_mesh(make_mesh({"context": 8})):
        lowered = jax.jit(lambda state, batch: nnx.merge(nnx.graphdef(model), state)(batch)).lower(
            nnx.state(model), batch
        )
    gathered = re.findall(r"stablehlo\.all_gather.* : \(tensor<\S*x(\w+)>\)", lowered.as_text())
    assert gathered.count("f32") == 1 + 2
    assert gathered.count("i32") == 2  # the ids that the two embedding tables are asked for
