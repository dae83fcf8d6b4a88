"""An image, and what is said of it."""

from typing import Any

from gemma4_jax.data.document import Document, Text
from gemma4_jax.data.tasks.media import as_image
from gemma4_jax.data.tasks.text import as_text


def caption(image: Any, text: Any, prompt: str = "") -> Document:
    """An image, then a prompt without loss, then the text to learn: a caption, a label, the answer to a question."""
    question = as_text(prompt)
    asked = (Text(question, loss=False),) if question else ()
    return Document((as_image(image), *asked, Text(as_text(text))))
