"""A column of text."""

import math
from typing import Any

import numpy as np

from gemma4_jax.data.document import Document, Text
from gemma4_jax.errors import InputError


def text(text: Any) -> Document:
    """A document of text alone, all of it learned."""
    return Document((Text(as_text(text)),))


def as_text(value: Any) -> str:
    """The text of a column: strings, UTF-8, or numbers as they are written.

    Raises:
      InputError: it is none of these.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    is_finite = not isinstance(value, float | np.floating) or math.isfinite(value)
    if isinstance(value, str | int | float | np.number) and not isinstance(value, bool) and is_finite:
        return str(value)
    raise InputError(f"text cannot be {value!r:.100}: give a string, UTF-8 or a number.")
