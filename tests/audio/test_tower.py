"""What holds of the audio tower without a reference; the comparison is in tests/hf/."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.audio.features import FRAMES_PER_SOFT_TOKEN, num_frame_places, num_soft_tokens
from gemma4_jax.audio.tower import AudioTower
from gemma4_jax.config import AudioConfig
from tests.hf import samples

CONFIG = AudioConfig(
    embed_dim=16, num_layers=2, num_heads=2, subsampling_channels=(8, 4), output_dim=12, uses_clipped_linears=False
)


def build(config: AudioConfig, remat: str = "none") -> AudioTower:
    return AudioTower(nnx.Rngs(0), config, dtype=jnp.float32, param_dtype=jnp.float32, remat_policy=remat)


@pytest.fixture(scope="module")
def tower():
    return build(CONFIG)


IDS = jnp.asarray(np.arange(204) < [[203], [77]], jnp.int32)
"""Of two rows with one sound each, of 203 frames and of 77."""


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).standard_normal((2, 204, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def encoded(tower, features):
    return np.asarray(tower(features, IDS))


def test_a_soft_token_for_every_four_frames(encoded):
    assert encoded.shape == (2, 51, 12)


def test_what_lies_behind_the_end_is_not_heard(tower, features, encoded):
    # However long the buffer and whatever is in it: the values are those of the sound alone.
    alone = np.asarray(tower(features[1:, :80], IDS[1:, :80]))
    np.testing.assert_allclose(encoded[1, :20], alone[0], rtol=0, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, attention_context_right=3)])
def test_sounds_in_one_buffer_do_not_hear_each_other(config, features):
    """Of every length modulo the strides, each where the one before it leaves off."""
    tower = build(config)
    lengths = [31, 16, 17, 18, 5, 1, 40]
    assert {length % FRAMES_PER_SOFT_TOKEN for length in lengths} == {0, 1, 2, 3}
    row, ids, starts, start = np.full((1, 204, 8), 9.0, np.float32), np.zeros((1, 204), np.int32), [], 0
    for number, length in enumerate(lengths, start=1):
        row[0, start : start + length], ids[0, start : start + length] = features[0, :length], number
        starts.append(start // FRAMES_PER_SOFT_TOKEN)
        start += num_frame_places(length)
    together = np.asarray(tower(row, jnp.asarray(ids)))[0]
    for first, length in zip(starts, lengths, strict=True):
        size = FRAMES_PER_SOFT_TOKEN * num_soft_tokens(length)
        alone = np.asarray(tower(features[:1, :size], jnp.asarray(np.arange(size) < length, jnp.int32)[None]))[0]
        given = together[first : first + len(alone)]
        np.testing.assert_allclose(given, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_a_token_hears_the_past_and_not_the_future(tower, features, encoded):
    changed = features.copy()
    changed[0, 120:] += 1
    difference = np.abs(np.asarray(tower(changed, IDS)) - encoded)[0].max(axis=-1)
    # The two convolutions of token i read frames 4 i - 3 to 4 i + 3.
    assert difference[:30].max() == 0
    assert difference[30:].min() > 0


def test_remat_changes_nothing(features, encoded):
    np.testing.assert_array_equal(np.asarray(build(CONFIG, "full")(features, IDS)), encoded)


def test_a_batch_without_sounds_is_as_before():
    config = samples.variant("e2b_audio")
    weights = samples.lively_weights(config)
    document = [[2, 20, 21, 22]]
    hears = samples.model(config, weights)
    deaf = samples.model(dataclasses.replace(config, audio=None), weights)
    rows = samples.batch([[document]], config)
    assert rows.audio_features.shape[1] == 0
    np.testing.assert_array_equal(np.asarray(hears(rows)), np.asarray(deaf(rows)))


def test_sounds_make_a_difference_where_they_stand():
    config = samples.variant("e2b_audio")
    model = samples.model(config, samples.lively_weights(config))
    (document,) = samples.cases(config)["one_sound"]
    rows = samples.batch([[document]], config)
    louder = dataclasses.replace(rows, audio_features=rows.audio_features + 1)
    difference = np.abs(np.asarray(model(rows)) - np.asarray(model(louder))).max(axis=-1)[0]
    first = int(np.argmax(np.asarray(rows.audio_slots)[0] >= 0))
    assert difference[:first].max() == 0
    assert difference[first:].min() > 0
