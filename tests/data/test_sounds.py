"""Sound files: what their samples are, and what is refused."""

import io
import wave

import numpy as np
import pytest

from gemma4_jax.audio.features import MAX_SAMPLES
from gemma4_jax.data.sounds import decode_wav
from gemma4_jax.errors import InputError


def wav(samples: np.ndarray, *, rate: int = 16_000, width: int = 2) -> bytes:
    """[n, channels] integers as a file."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(samples.astype({1: np.uint8, 2: "<i2", 4: "<i4"}[width]).tobytes())
    return data.getvalue()


STEREO = np.array([[0, 0], [32767, -32768], [-32768, -32768], [100, 201]])


def test_samples():
    np.testing.assert_array_equal(decode_wav(wav(STEREO[:, :1])), np.float32([0, 32767 / 32768, -1, 100 / 32768]))
    np.testing.assert_array_equal(decode_wav(wav(STEREO)), np.float32([0, -0.5 / 32768, -1, 150.5 / 32768]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (wav(STEREO, rate=44_100), "44100 samples a second .* resample it to 16000"),
        (wav(STEREO, width=4), "32 bits and 2 channels"),
        (wav(np.zeros((4, 3))), "16 bits and 3 channels"),
        (wav(np.zeros((MAX_SAMPLES + 1, 1))), "480001 samples is too long"),
        (wav(STEREO)[:-3], "cannot be decoded"),
        (wav(STEREO)[:30], "cannot be decoded"),
        (b"OggS", "cannot be decoded .* whole WAV file of 16-bit PCM"),
        (b"", r"cannot be decoded \(it ends too early\)"),
    ],
)
def test_bad_files(data, reason):
    with pytest.raises(InputError, match=reason):
        decode_wav(data)


def test_hostile_bytes_are_never_another_error():
    rng = np.random.default_rng(0)
    good = np.frombuffer(wav(STEREO), np.uint8)
    for _ in range(300):
        damaged = good.copy()
        damaged[rng.integers(0, len(good), 3)] = rng.integers(0, 256, 3)
        try:
            decode_wav(damaged.tobytes())
        except InputError:
            continue
