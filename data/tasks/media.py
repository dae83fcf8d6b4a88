"""An image or a sound as records hold it."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax.data.document import Image, Sound
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
    """The sound of a column, in the forms of an image; an array is of samples.

    Raises:
      InputError: it is none of these.
    """
    content, name = _content_of(value)
    if isinstance(content, str | bytes | np.ndarray):
        return Sound(content, name)
    raise InputError(f"a sound cannot be {value!r:.100}: give samples, the bytes of a file, or its path.")


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
