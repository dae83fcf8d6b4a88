"""Images and sounds as records hold them."""

import numpy as np
import pytest

from gemma4_jax.data.sounds import read_samples
from gemma4_jax.data.tasks import TASKS
from gemma4_jax.data.tasks.media import as_sound
from gemma4_jax.errors import InputError

SAMPLES = 0.5 * np.sin(np.arange(16_000) / 7, dtype=np.float32)


@pytest.mark.parametrize(
    "array", [SAMPLES, SAMPLES.tolist(), SAMPLES.astype(np.float64), np.stack([SAMPLES, SAMPLES]), [SAMPLES.tolist()]]
)
def test_samples_are_heard_as_they_are(array):
    sound = as_sound({"array": array, "sampling_rate": 16_000, "path": "a.wav"})
    np.testing.assert_array_equal(read_samples(sound.content), SAMPLES)
    assert sound.name == "a.wav"


def test_samples_at_another_rate_are_resampled_as_those_of_a_file():
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)
    heard = read_samples(as_sound({"array": tone, "sampling_rate": 44_100}).content)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert heard.shape == expected.shape
    assert np.abs(heard - expected)[200:-200].max() < 2e-3


def test_the_bytes_of_a_file_go_before_samples():
    assert as_sound({"bytes": b"a", "array": [0.0], "sampling_rate": 1}).content == b"a"


def test_samples_may_stand_wherever_a_sound_may():
    sound = {"array": [0.0] * 99, "sampling_rate": 8000}
    expected = as_sound(sound)
    assert TASKS["speech"](audio=sound, text="a").segments[0] == expected
    assert TASKS["segments"](segments=[{"audio": sound}, {"text": "a"}]).segments[0] == expected
    said = {"role": "assistant", "content": "a"}
    inside = {"role": "user", "content": [{"type": "audio", "audio": sound}]}
    assert TASKS["chat"](messages=[inside, said]).segments == (expected,)
    beside = {"role": "user", "content": "<audio>What?"}
    assert TASKS["chat"](messages=[beside, said], audio=sound).segments == (expected,)


@pytest.mark.parametrize(
    ("array", "rate", "message"),
    [
        ([0.0], None, "the sampling_rate of a sound must be 1 to 192000 .* and is None"),
        ([0.0], 0, "the sampling_rate"),
        ([0.0], 10**9, "the sampling_rate"),
        ([0.0], True, "the sampling_rate"),
        ([0, 12_000], 16_000, r"floats within -1 and 1, .* and is \[0, 12000\]"),
        ([0.0, "a"], 16_000, "floats within"),
        ([[0.0], [0.0, 1.0]], 16_000, "floats within"),
        ([None], 16_000, "floats within"),
        ("abc", 16_000, "floats within"),
        (np.zeros((9, 4)), 16_000, "floats within"),
        (np.zeros(601), 1, "at most 600 s"),
    ],
)
def test_other_samples_are_refused(array, rate, message):
    with pytest.raises(InputError, match=message):
        as_sound({"array": array, "sampling_rate": rate})
