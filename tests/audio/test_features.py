"""Log-mel features. Golden values and the live comparison are of the reference's feature extractor."""

from pathlib import Path

import numpy as np
import pytest

from gemma4_jax.audio.features import MAX_SAMPLES, log_mel, num_frames, num_soft_tokens
from gemma4_jax.errors import InputError
from tests.hf import sounds

GOLDEN = Path(__file__).parents[1] / "golden" / "features.npz"

# Samples, frames, soft tokens: the arithmetic of the reference's processor.
LENGTHS = [
    (1, 0, 0), (160, 0, 0), (161, 1, 1), (320, 1, 1), (321, 2, 1), (480, 2, 1), (800, 4, 1), (801, 5, 2),
    (16_000, 99, 25),
]  # fmt: skip


@pytest.mark.parametrize(("num_samples", "frames", "soft_tokens"), [*LENGTHS, (MAX_SAMPLES, 2999, 750)])
def test_lengths(num_samples, frames, soft_tokens):
    assert num_frames(num_samples) == frames
    assert num_soft_tokens(frames) == soft_tokens
    assert log_mel(np.zeros(num_samples, np.float32), 128).shape == (frames, 128)


def test_golden():
    golden = np.load(GOLDEN)
    given = log_mel(sounds.make(np.random.default_rng(3), 4000), 128)
    # Libraries differ in the last bits of a logarithm; of the same library the values are equal.
    np.testing.assert_allclose(given, golden["features"], rtol=0, atol=2e-6)


def test_a_tone_is_loudest_in_its_band():
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    mel = 2595 * np.log10(1 + np.array([1000.0, 8000.0]) / 700)
    band = mel[0] / (mel[1] / 129) - 1
    assert abs(log_mel(tone, 128)[50].argmax() - band) <= 1


def test_silence_is_the_floor():
    np.testing.assert_array_equal(log_mel(np.zeros(3200), 8), np.float32(np.log(1e-3)))


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros(0), r"0 samples .* 1 to 480000 \(30 s"),
        (np.zeros(MAX_SAMPLES + 1), "480001 samples .* cut a longer one"),
        (np.zeros((2, 400)), r"shape \(2, 400\)"),
        (np.zeros(400, np.int16), "dtype int16"),
        (np.full(400, np.nan), "not finite"),
    ],
)
def test_bad_sounds(samples, reason):
    with pytest.raises(InputError, match=reason):
        log_mel(samples, 128)


@pytest.mark.parametrize("num_bins", [8, 128])
def test_equal_to_the_reference(num_bins):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    extractor = transformers.Gemma4AudioFeatureExtractor(feature_size=num_bins)
    rng = np.random.default_rng(5)
    heard = [sounds.make(rng, int(length)) for length in [161, 320, 480, 12_345, *rng.integers(161, 40_000, 12)]]
    out = extractor([sound.astype(np.float64) for sound in heard])
    for sound, features, mask in zip(heard, out["input_features"], out["input_features_mask"], strict=True):
        given = log_mel(sound, num_bins)
        assert mask.sum() == len(given)
        np.testing.assert_array_equal(given, features[mask])
