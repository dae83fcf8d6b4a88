"""Sounds to samples, of which the features that the audio tower reads are made."""

import dataclasses
import functools
import importlib
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gemma4_jax.audio.features import MAX_SAMPLES, SAMPLE_RATE
from gemma4_jax.data.document import Conversation, Document, Sound
from gemma4_jax.errors import InputError

FORMATS = ("WAV", "WAVEX", "FLAC", "MP3", "OGG")
"""Sound files that are read, as libsndfile calls them; it knows more."""

_STARTS = (b"RIFF", b"fLaC", b"OggS", b"ID3")

MAX_SECONDS = 600
"""A longer sound is refused before it is decoded."""

MAX_PIECE_SECONDS = MAX_SAMPLES // SAMPLE_RATE
"""Of what the tower hears at once; a longer sound is cut, see `cut_sounds`."""

MAX_RATE, MAX_CHANNELS = 192_000, 8
"""Of a file."""

MAX_RATIO = 1000
"""Of a file's rate to ours, as a fraction in lowest terms: 44,100 to 16,000 is 441 to 160."""

LOBES = 32
"""Of the low-pass filter's sinc on each side: it passes 0.88 of the lower of both ranges, and stops at its end."""


def num_samples(sound: Sound) -> int:
    """How many samples `read_samples` gives, by the header of the file alone.

    Raises:
      InputError: the file cannot be read, or is longer than `MAX_SECONDS`.
    """
    start, stop = sound.seconds or (0, MAX_SECONDS)
    return min(_length(sound), stop * SAMPLE_RATE) - start * SAMPLE_RATE


def read_samples(sound: Sound) -> np.ndarray:
    """The samples of a sound, or of the stretch of it that it stands for; of several channels the mean.

    Args:
      sound: not yet trusted. Its content is samples, or the bytes of a file in one of `FORMATS`, at any rate with a
        simple ratio to ours.
    Returns:
      [n] floats, 16,000 a second.
    Raises:
      InputError: the file cannot be read, or is too long.
    """
    start, stop = sound.seconds or (0, MAX_SECONDS)
    if isinstance(sound.content, str):
        raise InputError("a sound is a path, and its source has no files: give its bytes or samples.")
    if isinstance(sound.content, np.ndarray):  # which is judged where its features are made
        return sound.content[start * SAMPLE_RATE : stop * SAMPLE_RATE] if sound.seconds else sound.content
    wanted = num_samples(sound)
    if wanted > MAX_SAMPLES:
        raise InputError(
            f"A sound of {wanted / SAMPLE_RATE:.1f} s is too long: at most {MAX_PIECE_SECONDS} s are heard at once."
        )
    with _opened(sound.content) as file:
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


def cut_sounds(document: Document) -> Document:
    """The document with each sound of more than 30 s in pieces, one after another, where it stood.

    There are as few pieces as hold it, all of the same whole number of seconds but for the last, which is shorter. Each
    is a sound of its own, between its own marks.

    Raises:
      InputError: a sound is longer than `MAX_SECONDS`, or its file cannot be read.
    """
    if not any(isinstance(segment, Sound) for segment in document.segments):
        return document
    cut = [_pieces(segment) if isinstance(segment, Sound) else [segment] for segment in document.segments]
    counts = iter([len(pieces) for pieces in cut if isinstance(pieces[0], Sound)])
    conversation = document.conversation and _with_places(document.conversation, counts)
    return dataclasses.replace(
        document, segments=tuple(piece for pieces in cut for piece in pieces), conversation=conversation
    )


def _with_places(conversation: Conversation, counts: Iterator[int]) -> Conversation:
    """A conversation with so many places where each sound had one."""

    def spread(part: Any) -> list[Any]:
        is_sound = isinstance(part, Mapping) and part.get("type") == "audio"
        return [part] * (next(counts, 1) if is_sound else 1)

    messages = [
        {**message, "content": [copy for part in message["content"] for copy in spread(part)]}
        if isinstance(message.get("content"), list)
        else message
        for message in conversation.messages
    ]
    return dataclasses.replace(conversation, messages=tuple(messages))


def _pieces(sound: Sound) -> list[Sound]:
    try:
        seconds = _length(sound) / SAMPLE_RATE
    except InputError as error:
        raise InputError(f"{sound.name}: {error}" if sound.name else str(error)) from error
    number = math.ceil(seconds / MAX_PIECE_SECONDS)
    if number <= 1:
        return [sound]
    step = math.ceil(seconds / number)
    starts = range(0, math.ceil(seconds), step)
    return [dataclasses.replace(sound, seconds=(start, min(start + step, math.ceil(seconds)))) for start in starts]


def _length(sound: Sound) -> int:
    """Samples of the whole, 16,000 a second."""
    if isinstance(sound.content, bytes):
        with _opened(sound.content) as file:
            length = -(-file.frames * SAMPLE_RATE // file.samplerate)
    else:
        length = np.size(sound.content)
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
