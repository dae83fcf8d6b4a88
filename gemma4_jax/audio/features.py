"""Sound to log-mel features, as the audio tower reads them.

Frames of 20 ms every 10 ms, the first centred at the beginning of the sound; the magnitudes of their Fourier transform,
summed over triangular bands, and the logarithm of the sum.
Source: docs/gemma4.md section 4, and the feature extractor of the reference, which this equals bit for bit.
"""

import functools

import numpy as np

from gemma4_jax.errors import InputError

SAMPLE_RATE = 16_000
"""Samples a second of the sound that is read."""

MAX_SAMPLES = 30 * SAMPLE_RATE
"""The longest sound: 30 s, which become 750 soft tokens."""

FRAMES_PER_SOFT_TOKEN = 4
"""The two strides of the tower."""

FRAME, HOP, FFT = 320, 160, 512
MAX_HERTZ = 8000.0
FLOOR = 1e-3
"""Samples in a frame, between frames, and in a transform; the top of the highest band in Hertz; what the log adds."""


def num_frames(num_samples: int) -> int:
    """Frames of a sound: those that lie wholly inside it, and one sample more, once half a frame is put before it."""
    return max(0, (num_samples + FRAME // 2 - FRAME - 1) // HOP + 1)


def num_soft_tokens(frames: int) -> int:
    """Soft tokens that the tower makes of a number of frames: each of its two strides halves it, rounded up."""
    return -(-frames // FRAMES_PER_SOFT_TOKEN)


def num_frame_places(frames: int) -> int:
    """Places of a sound in a buffer of sounds one after another: whole soft tokens, and two at its end without a frame.

    Each of the two convolutions reads one place before and one behind: there, no sound meets the next.
    """
    return FRAMES_PER_SOFT_TOKEN * num_soft_tokens(frames + 2) if frames else 0


def log_mel(samples: np.ndarray, num_bins: int) -> np.ndarray:
    """The features of one sound.

    Args:
      samples: [n] floats, mono, 16,000 a second, usually within -1 and 1.
      num_bins: M, mel bands; `AudioConfig.num_mel_bins`.
    Returns:
      [F, M] float32, F = num_frames(n): none at all of a sound of 10 ms, as with the reference.
    Raises:
      InputError: the sound is not a row of finite numbers, is empty, or longer than 30 s.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise InputError(
            f"A sound of shape {samples.shape} and dtype {samples.dtype} is not possible: give [n] floats."
        )
    if not 0 < len(samples) <= MAX_SAMPLES:
        raise InputError(
            f"A sound of {len(samples)} samples is not possible: it must have 1 to {MAX_SAMPLES} "
            f"({MAX_SAMPLES // SAMPLE_RATE} s at {SAMPLE_RATE} a second); cut a longer one."
        )
    samples = samples.astype(np.float32)
    if not np.isfinite(samples).all():
        raise InputError("A sound holds samples that are not finite numbers: it is damaged.")
    if not num_frames(len(samples)):
        return np.zeros((0, num_bins), np.float32)
    padded = np.pad(samples, (FRAME // 2, 0))
    frames = np.lib.stride_tricks.sliding_window_view(padded[:-1], FRAME)[::HOP]
    magnitudes = np.abs(np.fft.rfft(frames * _window(), n=FFT))
    return np.log(magnitudes @ _mel_bands(num_bins) + FLOOR).astype(np.float32)


@functools.cache
def _window() -> np.ndarray:
    """[320] float32, the periodic Hann window."""
    return np.hanning(FRAME + 1)[:-1].astype(np.float32)


@functools.cache
def _mel_bands(num_bins: int) -> np.ndarray:
    """[257, M] float64: weight of each frequency in each band.

    A band is a triangle in Hertz whose corners are equally spaced on the mel scale, 2595 log10(1 + Hz / 700).
    """
    top = 2595.0 * np.log10(1.0 + MAX_HERTZ / 700.0)
    corners = 700.0 * (10.0 ** (np.linspace(0.0, top, num_bins + 2) / 2595.0) - 1.0)
    frequencies = np.linspace(0, SAMPLE_RATE // 2, FFT // 2 + 1)
    distance = corners - frequencies[:, None]
    width = np.diff(corners)
    rising, falling = -distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]
    return np.maximum(0.0, np.minimum(rising, falling))
