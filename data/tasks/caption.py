"""An image, and what is said of it."""

from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.tasks.text import as_text
from gemma4_jax.errors import InputError


def caption(image: Any, text: Any, prompt: str = "") -> Document:
    """An image, then a prompt without loss, then the text to learn: a caption, a label, the answer to a question."""
    question = as_text(prompt)
    asked = (Text(question, loss=False),) if question else ()
    return Document((as_image(image), *asked, Text(as_text(text))))


def as_image(value: Any) -> Image:
    """The image of a column: pixels, the bytes of a file, or a path.

    Raises:
      InputError: it is none of these.
    """
    if isinstance(value, str):
        return Image(value, name=value)
    if isinstance(value, bytes | np.ndarray | PIL.Image.Image):
        return Image(value)
    raise InputError(f"an image cannot be {value!r:.100}: give pixels, the bytes of a file, or its path.")
