"""A sound, and what is said in it."""

from typing import Any

from gemma4_jax.data.document import Document, Text
from gemma4_jax.data.tasks.media import as_sound
from gemma4_jax.data.tasks.text import as_text


def speech(audio: Any, text: Any, prompt: str = "") -> Document:
    """A sound, then a prompt without loss, then the text to learn: what is said, its translation, an answer.

    A sound of more than 30 s stands in pieces, see `data.sound_pieces.cut_sounds`.
    """
    question = as_text(prompt)
    asked = (Text(question, loss=False),) if question else ()
    return Document((as_sound(audio), *asked, Text(as_text(text))))
