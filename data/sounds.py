"""Sounds to samples, of which the features that the audio tower reads are made."""

import functools
import importlib
import io
import math
from typing import Any

import numpy as np

from gemma4_jax.audio.features import MAX_SAMPLES, SAMPLE_RATE
from gemma4_jax.errors import InputError

FORMATS = ("WAV", "WAVEX", "FLAC", "MP3", "OGG")
"""Sound files that are read, as libsndfile calls them; it knows more."""

_STARTS = (b"RIFF", b"fLaC", b"OggS", b"ID3")

MAX_SECONDS = 600
"""A longer sound is refused before it is decoded."""

MAX_PIECE_SECONDS = MAX_SAMPLES // SAMPLE_RATE
"""Of what the tower hears at once; a longer sound is cut, see `sound_pieces`."""

MAX_RATE, MAX_CHANNELS = 192_000, 8
"""Of a file."""

MAX_RATIO = 1000
"""Of a file's rate to ours, as a fraction in lowest terms: 44,100 to 16,000 is 441 to 160."""

LOBES = 32
"""Of the low-pass filter's sinc on each side: it passes 0.88 of the lower of both ranges, and stops at its end."""


def num_samples(content: np.ndarray | bytes, seconds: tuple[int, int] | None = None) -> int:
    """How many samples `read_samples` gives, by the header of the file alone.

    Raises:
      InputError: the file cannot be read, is empty, or too long.
    """
    start, stop = seconds or (0, MAX_SECONDS)
    number = min(whole_length(content), stop * SAMPLE_RATE) - start * SAMPLE_RATE
    if number <= 0:
        raise InputError("A sound without a sample is not possible.")
    if number > MAX_SAMPLES:
        raise InputError(
            f"A sound of {number / SAMPLE_RATE:.1f} s is too long: at most {MAX_PIECE_SECONDS} s are heard at once."
        )
    return number


def read_samples(content: np.ndarray | bytes, seconds: tuple[int, int] | None = None) -> np.ndarray:
    """The samples of a sound, or of a stretch of it; of several channels the mean.

    Args:
      content: not yet trusted. Samples, or the bytes of a file in one of `FORMATS`, at any rate with a simple ratio to
        ours.
      seconds: (first, behind the last) of the stretch; None for all.
    Returns:
      [n] floats, 16,000 a second.
    Raises:
      InputError: the file cannot be read, or is too long.
    """
    start, stop = seconds or (0, MAX_SECONDS)
    if isinstance(content, np.ndarray):  # which is judged where its features are made
        return content[start * SAMPLE_RATE : stop * SAMPLE_RATE] if seconds else content
    wanted = num_samples(content, seconds)
    with _opened(content) as file:
        rate = file.samplerate
        # A second more on both sides than is wanted: the filter reaches less far, so no piece has an edge.
        first, last = max(0, start - 1), start + math.ceil(wanted / SAMPLE_RATE) + 1
        try:
            file.seek(first * rate)
            frames = file.read((last - first) * rate, dtype="float32", always_2d=True)
        except Exception as error:  # damaged files end in exceptions of several kinds
            raise InputError(_refusal(str(error))) from error
        if len(frames) < min(last * rate, file.frames) - first * rate:
            raise InputError(_refusal("it ends too early"))
    samples = _resample(frames.mean(axis=1), rate)[(start - first) * SAMPLE_RATE :][:wanted]
    return samples.astype(np.float32, copy=False)


def whole_length(content: np.ndarray | bytes) -> int:
    """Samples of all of a sound, 16,000 a second, by the header of its file.

    Raises:
      InputError: the file cannot be read, or is longer than `MAX_SECONDS`.
    """
    if isinstance(content, bytes):
        with _opened(content) as file:
            length = -(-file.frames * SAMPLE_RATE // file.samplerate)
    else:
        length = np.size(content)
    if length > MAX_SECONDS * SAMPLE_RATE:
        raise InputError(f"A sound of {length / SAMPLE_RATE:.0f} s is refused: at most {MAX_SECONDS} s are read.")
    return length


def _opened(data: bytes) -> Any:
    """The file, of which no more is known than its header says."""
    try:
        soundfile = importlib.import_module("soundfile")  # with a library of its own, which few runs need
    except (ImportError, OSError) as error:
        raise InputError(f"Sound files need soundfile, which cannot be imported ({error}): install it.") from error
    try:
        if not data.startswith(_STARTS) and not (data[:1] == b"\xff" and data[1:2] >= b"\xe0"):  # of an MP3
            raise ValueError("it is of another format")
        file = soundfile.SoundFile(io.BytesIO(data))
        if file.format not in FORMATS:
            raise ValueError(f"it is of another format, {file.format}")
    except Exception as error:  # hostile bytes end in exceptions of several kinds
        raise InputError(_refusal(str(error))) from error
    rate, channels = file.samplerate, file.channels
    if not 0 < channels <= MAX_CHANNELS or not 0 < rate <= MAX_RATE or max(_ratio(rate)) > MAX_RATIO:
        kind = f"{rate} samples a second in {channels} channels"
        raise InputError(f"A sound of {kind} cannot be read: resample it to {SAMPLE_RATE}, in mono or stereo.")
    return file


def _refusal(reason: str) -> str:
    formats = ", ".join(name for name in FORMATS if name != "WAVEX")
    reason = reason.strip().rstrip(".") or "it is damaged"
    return f"A sound file cannot be decoded ({reason}): give a whole file of {formats}."


def _ratio(rate: int) -> tuple[int, int]:
    """(up, down): our rate to that of a file, in lowest terms."""
    common = math.gcd(rate, SAMPLE_RATE)
    return SAMPLE_RATE // common, rate // common


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """[n] float32 at any rate to ours."""
    up, down = _ratio(rate)
    if up == down:
        return samples
    from scipy.signal import resample_poly  # slow to import

    return resample_poly(samples, up, down, window=_low_pass(max(up, down)))


@functools.lru_cache(maxsize=4)
def _low_pass(factor: int) -> np.ndarray:
    """A Kaiser-windowed sinc that stops, by 60 dB, what is above 1 / factor of the range."""
    from scipy.signal import firwin

    return firwin(2 * LOBES * factor + 1, 0.94 / factor, window=("kaiser", 6.0)).astype(np.float32)
