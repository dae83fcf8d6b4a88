import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.ops.attention import Sites, dot_attention, segment_attention, visible

# float32 sums in another order: the largest measured error of an output or a gradient is 5e-7.
TOLERANCE = 3e-6


def sites(segments: list[list[int]], images: list[list[int]]) -> Sites:
    index = np.broadcast_to(np.arange(len(segments[0])), np.shape(segments))
    return Sites(jnp.asarray(index), jnp.asarray(segments), jnp.asarray(images))


# Two rows: a document with two images that follow each other, one with an image at its end, padding; and one document
# that begins with an image.
SEGMENTS = [[1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 14]
IMAGES = [[0, 1, 1, 1, 2, 2, 0, 0, 0, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 2]]


@pytest.mark.parametrize(("window", "is_bidirectional"), itertools.product([None, 1, 3, 100], [False, True]))
def test_visible_is_what_the_specification_says_of_every_pair(window, is_bidirectional):
    given = visible(*[sites(SEGMENTS, IMAGES)] * 2, window=window, image_blocks_bidirectional=is_bidirectional)
    for b, (segments, images) in enumerate(zip(SEGMENTS, IMAGES, strict=True)):
        for t, s in itertools.product(range(len(segments)), repeat=2):
            same_image = is_bidirectional and images[t] != 0 and images[t] == images[s]
            near = window is None or t - s < window
            expected = segments[t] == segments[s] and near and (s <= t or same_image)
            assert given[b, t, s] == expected, (b, t, s)


def test_inside_an_image_the_window_bounds_the_look_back_only():
    block = sites([[1] * 6], [[1] * 6])
    given = visible(block, block, window=2, image_blocks_bidirectional=True)
    np.testing.assert_array_equal(given[0], np.triu(np.ones((6, 6), bool), -1))


def test_every_query_sees_itself():
    for window in (None, 1):
        given = visible(*[sites(SEGMENTS, IMAGES)] * 2, window=window, image_blocks_bidirectional=False)
        assert np.all(np.diagonal(given, axis1=1, axis2=2))


def test_queries_may_stand_behind_the_keys_of_a_cache():
    whole = sites(SEGMENTS, IMAGES)
    late = jax.tree.map(lambda leaf: leaf[:, 9:], whole)
    expected = visible(whole, whole, window=3, image_blocks_bidirectional=True)[:, 9:]
    np.testing.assert_array_equal(visible(late, whole, window=3, image_blocks_bidirectional=True), expected)


def random(*shape: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_dot_attention_is_a_softmax_for_each_head_of_its_group():
    q, k, v = random(2, 5, 6, 4, seed=0), random(2, 7, 3, 4, seed=1), random(2, 7, 3, 4, seed=2)
    mask = np.array(jax.random.bernoulli(jax.random.key(3), 0.6, (2, 5, 7)))
    mask[..., 0] = True
    given = dot_attention(q, k, v, jnp.asarray(mask))
    for b, t, n in np.ndindex(2, 5, 6):
        logits = np.array(k[b, :, n // 2] @ q[b, t, n])
        weights = np.where(mask[b, t], np.exp(logits), 0)
        expected = weights @ v[b, :, n // 2] / weights.sum()
        np.testing.assert_allclose(given[b, t, n], expected, atol=TOLERANCE)


def test_attention_by_segment_is_attention_under_a_block_mask():
    """Segments of several lengths, tokens in any order, a segment without tokens, tokens without a segment."""
    members = np.full((2, 4, 5), -1)
    members[0, 0, :3], members[0, 1, :5], members[0, 3, :1] = [4, 2, 9], [0, 1, 3, 11, 10], [6]
    members[1, 0, :5], members[1, 2, :2] = [7, 8, 9, 10, 11], [0, 5]
    segment_of = np.full((2, 12), -1)
    for b, i, w in np.argwhere(members >= 0):
        segment_of[b, members[b, i, w]] = i
    is_member = segment_of >= 0
    mask = jnp.asarray(segment_of[:, :, None] == segment_of[:, None, :])
    q, k, v, direction = (random(2, 12, 2, 4, seed=seed) for seed in range(4))

    def by_segment(q, k, v):
        return segment_attention(q, k, v, jnp.asarray(members))

    def by_mask(q, k, v):
        return dot_attention(q, k, v, mask) * is_member[..., None, None]

    np.testing.assert_allclose(by_segment(q, k, v), by_mask(q, k, v), atol=TOLERANCE)
    given, expected = (
        jax.grad(lambda *qkv, attend=attend: jnp.sum(attend(*qkv) * direction), argnums=(0, 1, 2))(q, k, v)
        for attend in (by_segment, by_mask)
    )
    for ours, plain in zip(given, expected, strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(ours, plain, atol=TOLERANCE)
