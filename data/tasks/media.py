"""An image or a sound as records hold it."""

import base64
import binascii
import reprlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax.data.document import Image, Sound
from gemma4_jax.data.sounds import MAX_CHANNELS, MAX_RATE, MAX_SECONDS
from gemma4_jax.data.sources.files import MAX_FILE_BYTES
from gemma4_jax.errors import InputError


def as_image(value: Any) -> Image:
    """The image of a column: pixels, the bytes of a file, its path, a data: URI, or {"bytes": ..., "path": ...}.

    Raises:
      InputError: it is none of these.
    """
    content, name = _content_of(value)
    if isinstance(content, str | bytes | np.ndarray | PIL.Image.Image):
        return Image(content, name=name)
    raise InputError(f"an image cannot be {value!r:.100}: give pixels, the bytes of a file, or its path.")


def as_sound(value: Any) -> Sound:
    """The sound of a column, in the forms of an image; an array is of samples, 16,000 a second.

    Or {"array": [0.0, ...], "sampling_rate": 44100}, which is what `datasets` makes of a file: floats within -1 and 1.

    Raises:
      InputError: it is none of these.
    """
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("array") is not None:
        path = value.get("path")
        return Sound(_wav(value["array"], value.get("sampling_rate")), path if isinstance(path, str) else "")
    content, name = _content_of(value)
    if isinstance(content, str | bytes | np.ndarray):
        return Sound(content, name)
    raise InputError(f"a sound cannot be {value!r:.100}: give samples, the bytes of a file, or its path.")


def _wav(array: Any, rate: Any) -> bytes:
    """Samples as the file that they are read from, so that they are judged, resampled and cut like any other.

    Args:
      array: [n] floats, or [C, n] of C channels.
      rate: samples a second.
    """
    if type(rate) is not int or not 0 < rate <= MAX_RATE:
        raise InputError(f"the sampling_rate of a sound must be 1 to {MAX_RATE} samples a second, and is {rate!r:.60}.")
    try:
        samples = np.asarray(array)
        samples = samples[None] if samples.ndim == 1 else samples
        is_known = samples.dtype.kind in "fiu" and samples.ndim == 2 and 0 < len(samples) <= MAX_CHANNELS
        # Whole numbers of 16 bits would be heard as noise; a float may be a little too loud.
        is_known = is_known and (samples.dtype.kind == "f" or np.abs(samples).max(initial=0) <= 1)
    except ValueError:  # of ragged lists
        is_known = False
    if not is_known or samples.shape[1] > MAX_SECONDS * rate:
        raise InputError(
            f"the array of a sound must be floats within -1 and 1, [n] or [channels, n], of at most {MAX_SECONDS} s, "
            f"and is {reprlib.repr(array):.60}."
        )
    data = np.ascontiguousarray(samples.T, "<f4").tobytes()
    channels = len(samples)
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, channels, rate, 4 * channels * rate, 4 * channels, 32)  # 3: floats
    body = b"WAVE" + head + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def _content_of(value: Any) -> tuple[Any, str]:
    """(what is there, the name of its file)."""
    if isinstance(value, Mapping):  # as `datasets` writes a file: its bytes if it has them, else where it is
        path = value.get("path")
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"], path if isinstance(path, str) else ""
        value = path
    if isinstance(value, str) and value.startswith("data:"):
        return _decode(value), ""
    return value, value if isinstance(value, str) else ""


def _decode(uri: str) -> bytes:
    """The bytes of a data: URI."""
    head, comma, data = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(f"the data: URI {uri[:40]!r} cannot be read: give one in base64.")
    return decode_base64(data)


def decode_base64(data: str) -> bytes:
    """The bytes of a file in base64.

    Raises:
      InputError: it is no base64, or of a file that is too large.
    """
    if len(data) > MAX_FILE_BYTES * 4 // 3:
        raise InputError(f"a file of {len(data) * 3 // 4} bytes is refused: at most {MAX_FILE_BYTES} are read.")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"base64 cannot be read ({error}).") from error
