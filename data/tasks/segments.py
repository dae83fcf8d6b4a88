"""Our own shape of a record, text, images and sounds in any order:

    {"segments": [{"image": "cat.png"}, {"text": "What is this? ", "loss": false}, {"text": "A cat.\\n"}]}
    {"text": "A document of text alone; short for one text segment."}

A text segment carries loss unless it says `"loss": false`. An image may bring its own budget: `"max_soft_tokens": 140`.
A sound is `{"audio": "cat.flac"}`.
"""

from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax.data.document import Document, Image, Sound, Text
from gemma4_jax.data.tasks.media import as_image, as_sound
from gemma4_jax.errors import InputError


def segments(**record: Any) -> Document:
    """The document that a record spells out; see this module's page."""
    match record:
        case {"text": str(text)} if len(record) == 1:
            return Document((Text(text),))
        case {"segments": [_, *_] as parts} if len(record) == 1:
            return Document(tuple(map(_segment, parts)))
    raise InputError('a record must be {"text": TEXT} or {"segments": [SEGMENT, ...]}, with nothing else.')


def _segment(segment: Any) -> Text | Image | Sound:
    match segment:
        case {"text": str(text)} if segment.keys() <= {"text", "loss"}:
            loss = segment.get("loss", True)
            if isinstance(loss, bool):
                return Text(text, loss)
        case {"image": str() | bytes() | dict() | np.ndarray() | PIL.Image.Image()} if segment.keys() <= _IMAGE_FIELDS:
            image = as_image(segment["image"])
            return Image(image.content, segment.get("max_soft_tokens"), image.name)
        case {"audio": str() | bytes() | dict() | np.ndarray()} if len(segment) == 1:
            return as_sound(segment["audio"])
    raise InputError(
        'a segment must be {"text": TEXT, "loss": true or false}, {"image": PATH, "max_soft_tokens": NUMBER} or '
        '{"audio": PATH}; loss and max_soft_tokens may be left out.'
    )


_IMAGE_FIELDS = {"image", "max_soft_tokens"}
