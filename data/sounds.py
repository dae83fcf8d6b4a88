"""Sound files to samples, of which the features that the audio tower reads are made."""

import io
import wave

import numpy as np

from gemma4_jax.audio.features import MAX_SAMPLES, SAMPLE_RATE
from gemma4_jax.errors import InputError


def decode_wav(data: bytes) -> np.ndarray:
    """The samples of a WAV file, [n] float32 within -1 and 1; of two channels the mean.

    Raises:
      InputError: if the bytes are not a whole WAV file of 16-bit PCM, mono or stereo, 16,000 samples a second and at
        most 30 s.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate, length, *_ = file.getparams()
            if rate != SAMPLE_RATE:
                raise InputError(f"A sound of {rate} samples a second cannot be read: resample it to {SAMPLE_RATE}.")
            if width != 2 or channels > 2:
                kind = f"{8 * width} bits and {channels} channels"
                raise InputError(f"A sound of {kind} cannot be read: store it with 16 bits, in mono or stereo.")
            if length > MAX_SAMPLES:
                raise InputError(f"A sound of {length} samples is too long: at most {MAX_SAMPLES} (30 s) are read.")
            samples = np.frombuffer(file.readframes(length), "<i2").reshape(length, channels)
    except InputError:
        raise
    except Exception as error:  # hostile bytes end in exceptions of several kinds
        reason = str(error) or "it ends too early"  # an EOFError says nothing
        raise InputError(f"A sound file cannot be decoded ({reason}): give a whole WAV file of 16-bit PCM.") from error
    return samples.mean(axis=1, dtype=np.float32) / np.float32(1 << 15)
