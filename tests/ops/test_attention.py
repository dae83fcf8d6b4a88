import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.ops.attention import IMPLEMENTATIONS, Implementation, Shape, attend, check_policy, choose
from gemma4_jax.ops.attention.spans import Spans, document_spans, member_spans
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import make_mesh

# float32 sums in another order, relative to the largest entry: the largest measured error is 4e-7.
TOLERANCE = 2e-6

# Two rows: a document with two images that follow each other, one with an image at its end, padding; and one document
# that begins with an image.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 14])
IMAGES = np.array([[0, 1, 1, 1, 2, 2, 0, 0, 0, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 2]])


def positions_of(segments: np.ndarray) -> np.ndarray:
    """Places of tokens in their documents, as a Batch has them: 0 on padding."""
    index = np.arange(segments.shape[1])
    firsts = np.array([[np.flatnonzero(row == segment)[0] for segment in row] for row in segments])
    return np.where(segments > 0, index - firsts, 0)


def spans_of(segments: np.ndarray, images: np.ndarray | None, window: int | None) -> Spans:
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    image_ids = None if images is None else jnp.asarray(images)
    return document_spans(jnp.asarray(positions_of(segments)), index, window=window, image_ids=image_ids)


@pytest.mark.parametrize(("window", "is_bidirectional"), itertools.product([None, 1, 3, 100], [False, True]))
def test_spans_are_what_the_specification_says_of_every_pair(window, is_bidirectional):
    mask = spans_of(SEGMENTS, IMAGES if is_bidirectional else None, window).mask(14)
    for b, (segments, images) in enumerate(zip(SEGMENTS, IMAGES, strict=True)):
        for t, s in itertools.product(range(len(segments)), repeat=2):
            same_image = is_bidirectional and images[t] != 0 and images[t] == images[s]
            near = window is None or t - s < window
            expected = segments[t] == segments[s] and near and (s <= t or same_image)
            if segments[t] == 0:
                expected = s == t
            assert mask[b, t, s] == expected, (b, t, s)


@pytest.mark.parametrize(
    ("window", "is_bidirectional", "drawn"),
    [
        (None, False, ["x.......", "xx......", "xxx.....", "xxxx....", "xxxxx...", ".....x..", ".....xx.", ".......x"]),
        (2, False, ["x.......", "xx......", ".xx.....", "..xx....", "...xx...", ".....x..", ".....xx.", ".......x"]),
        (2, True, ["x.......", "xxxx....", ".xxx....", "..xx....", "...xx...", ".....x..", ".....xx.", ".......x"]),
    ],
)
def test_masks_drawn_by_hand(window, is_bidirectional, drawn):
    """A token, an image of three soft tokens and a token; a document of two tokens; padding. Queries go down."""
    segments, images = np.array([[1, 1, 1, 1, 1, 2, 2, 0]]), np.array([[0, 1, 1, 1, 0, 0, 0, 0]])
    mask = spans_of(segments, images if is_bidirectional else None, window).mask(8)[0]
    assert ["".join("x" if sees else "." for sees in line) for line in mask] == drawn


def test_inside_an_image_the_window_bounds_the_look_back_only():
    block = np.ones((1, 6), int)
    np.testing.assert_array_equal(spans_of(block, block, 2).mask(6)[0], np.triu(np.ones((6, 6), bool), -1))


def test_members_see_their_group_and_padding_itself():
    mask = member_spans(jnp.asarray([[1, 1, 2, 2, 2, 3, 0, 0]])).mask(8)[0]
    ids = np.array([1, 1, 2, 2, 2, 3, -1, -2])  # padding as groups of one
    np.testing.assert_array_equal(mask, ids[:, None] == ids)


def test_a_query_behind_a_cache_sees_the_filled_places_of_its_document():
    spans = document_spans(jnp.array([[9], [4]]), jnp.array([[9], [4]]), window=3)
    np.testing.assert_array_equal(spans.mask(12)[0, 0], np.isin(np.arange(12), [7, 8, 9]))
    np.testing.assert_array_equal(spans.mask(12)[1, 0], np.isin(np.arange(12), [2, 3, 4]))


def random(*shape: int, seed: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = mask[b, t]
        weights = np.exp(k[b, seen, n // group].astype(np.float64) @ q[b, t, n])
        out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


# Kernels have tests of their own.
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name not in {"interval", "mosaic_gpu"}])
def test_every_implementation_is_a_softmax_over_the_span_for_each_head_of_its_group(name):
    q, k, v = random(2, 14, 6, 4, seed=0), random(2, 14, 3, 4, seed=1), random(2, 14, 3, 4, seed=2)
    spans = spans_of(SEGMENTS, None if name == "banded" else IMAGES, 3)  # images have no bound that it could know
    given = attend(q, k, v, spans, implementation=name)
    np.testing.assert_allclose(given, by_hand(*map(np.asarray, (q, k, v)), np.asarray(spans.mask(14))), atol=TOLERANCE)


def layout(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of documents of many lengths with images in them, across the borders of blocks, and padding."""
    rng = np.random.default_rng(seed)
    segments, images = np.zeros((2, length), int), np.zeros((2, length), int)
    for b in range(2):
        start, document = 0, 0
        while start < length - 20:
            size = min(int(rng.integers(1, 150)), length - 10 - start)
            document += 1
            segments[b, start : start + size] = document
            if size > 8:
                first = start + int(rng.integers(0, size // 2))
                images[b, first : first + int(rng.integers(1, size // 2))] = document
            start += size
    return segments, images


# (spans, keys): documents with images under a window, without any, without a window, frames of sounds, patches, and a
# cache longer than the queries.
CASES = {
    "sliding": (lambda: spans_of(*layout(304, 0), 40), 304),
    "global": (lambda: spans_of(layout(304, 1)[0], None, None), 304),
    "window": (lambda: spans_of(layout(304, 4)[0], None, 40), 304),
    "heard": (lambda: member_spans(jnp.asarray(layout(304, 5)[0]), back=11, ahead=7), 304),
    "patches": (lambda: member_spans(jnp.asarray(layout(304, 2)[0])), 304),
    "cache": (lambda: spans_of(layout(304, 3)[0], None, 100), 350),
}


@functools.cache
def outputs_and_gradients(name: str, case: str, dtype: jnp.dtype, mesh: tuple[tuple[str, int], ...] = ()) -> list:
    make_spans, num_keys = CASES[case]
    spans = make_spans()
    heads = 2 if "cache" in case else 4
    q, direction = random(2, 304, 4, 8, seed=0, dtype=dtype), random(2, 304, 4, 8, seed=3)
    k, v = (random(2, num_keys, heads // 2, 8, seed=seed, dtype=dtype) for seed in (1, 2))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, spans, implementation=name)
        return jnp.sum(out.astype(jnp.float32) * direction), out

    compute = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    if not mesh:
        gradients, out = compute(q, k, v)
    else:
        with jax.set_mesh(make_mesh(dict(mesh))):
            gradients, out = compute(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_close(given: list, expected: list, tolerance: float) -> None:
    for ours, plain in zip(given, expected, strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(ours, plain, atol=tolerance * np.abs(plain).max())


def able(names: Iterable[str], cases: Iterable[str]) -> list[tuple[str, str]]:
    """(implementation, case) for what an implementation is for."""
    pairs = []
    for name, case in itertools.product(names, cases):
        make_spans, num_keys = CASES[case]
        shape = Shape(304, num_keys, 8, make_spans().back, make_spans().ahead)
        pairs += [(name, case)] if IMPLEMENTATIONS[name].reason_against(shape, "cpu") is None else []
    return pairs


@pytest.mark.parametrize(("name", "case"), able([name for name in IMPLEMENTATIONS if name not in {"reference"}], CASES))
def test_every_implementation_equals_the_reference_forward_and_backward(name, case):
    expected = outputs_and_gradients("reference", case, jnp.float32)
    assert_close(outputs_and_gradients(name, case, jnp.float32), expected, TOLERANCE)
    # In bfloat16 both are as far from float32: the reference by 1.0e-2 of the largest entry at most.
    assert_close(outputs_and_gradients(name, case, jnp.bfloat16), expected, 3e-2)


MESHES = [{"data": 2, "tensor": 4}, {"context": 2, "fsdp": 2, "tensor": 2}, {"context": 4, "expert": 2}, {"context": 8}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("name", "case"), able(IMPLEMENTATIONS, ["sliding", "cache", "window", "heard"]))
def test_on_a_mesh_it_is_the_same(name, case, mesh):
    """Among them: queries that are spread, fewer key-value heads than shards of heads."""
    given = outputs_and_gradients(name, case, jnp.float32, tuple(mesh.items()))
    assert_close(given, outputs_and_gradients("reference", case, jnp.float32), TOLERANCE)


def test_blocks_that_nobody_sees_are_not_visited():
    """The rest of the row is not a number, and does not matter."""
    ids = np.repeat([1, 2], [70, 330])[None]
    q, k, v = (random(1, 400, 1, 4, seed=seed) for seed in range(3))
    broken = jnp.where((jnp.arange(400) >= 128)[:, None, None], jnp.nan, v)
    given = attend(q, k, broken, member_spans(jnp.asarray(ids)), implementation="blockwise")
    assert np.isfinite(given[:, :64]).all()
    assert np.isnan(given[:, 70:]).all()


def test_the_choice_is_the_first_that_can_and_names_why_others_cannot(caplog):
    caplog.set_level("INFO")
    assert choose(KernelPolicy(), Shape(512, 512, 64)) == "blockwise"
    assert choose(KernelPolicy(), Shape(1, 511, 64)) == "reference"
    assert "not blockwise: it has fewer queries than a block, which is 64;" in caplog.text
    assert choose(KernelPolicy("gpu"), Shape(512, 512, 256)) == "blockwise"
    with pytest.raises(InputError, match=r"attention='flash' is not possible: .* one of interval, banded, blockwise"):
        choose(KernelPolicy(attention="flash"), Shape(512, 512, 64))


def test_a_name_that_cannot_compute_one_kind_of_layer_gives_way_there_with_a_warning(caplog):
    assert choose(KernelPolicy(attention="blockwise"), Shape(1, 510, 64)) == "reference"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "not blockwise: it has fewer queries than a block" in record.getMessage()


def test_a_name_that_can_compute_no_layer_is_refused():
    sliding, causal, patches = Shape(512, 512, 64, 63, 0), Shape(512, 512, 128, None, 0), Shape(512, 512, 16)
    for name in ("auto", "banded", "blockwise", "reference"):
        check_policy(KernelPolicy(attention=name), [sliding, causal])
    with pytest.raises(
        InputError,
        match=r"^attention='interval' is not possible for any layer of this model on cpu \(it is written for TPUs\): "
        r"it must be auto, banded, blockwise or reference\.$",
    ):
        check_policy(KernelPolicy(attention="interval"), [sliding, causal, patches])
    with pytest.raises(InputError, match=r"on gpu \(nothing bounds how far a query sees\): it must be auto, blockwise"):
        check_policy(KernelPolicy("gpu", "banded"), [causal, patches])
    with pytest.raises(InputError, match=r"attention='flash' is not possible: it must be auto, or one of interval"):
        check_policy(KernelPolicy(attention="flash"), [sliding])


def test_a_stranger_registers_an_implementation_in_a_few_lines(monkeypatch):
    def from_jax(q, k, v, spans):
        mask = spans.mask(k.shape[1])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0)

    def reason_against(shape, platform):
        return None if platform == "cpu" else "it was tried on CPU only"

    monkeypatch.setitem(IMPLEMENTATIONS, "jax", Implementation(from_jax, reason_against))
    assert choose(KernelPolicy(attention="jax"), Shape(14, 14, 4)) == "jax"
    q, k, v = random(2, 14, 6, 4, seed=0), random(2, 14, 3, 4, seed=1), random(2, 14, 3, 4, seed=2)
    spans = spans_of(SEGMENTS, IMAGES, 3)
    given, expected = (attend(q, k, v, spans, implementation=name) for name in ("jax", "reference"))
    np.testing.assert_allclose(given, expected, atol=TOLERANCE)
