"""Documents of the web, texts and images in turn: two lists of one length, as OBELICS and MINT-1T have them.

    {"texts": ["A cat:", null, "and a dog:", null], "images": [null, IMAGE, null, IMAGE]}

An image is what `media.as_image` reads: bytes, {"bytes": ..., "path": ...} or a path. Images of the web are gone now
and then: where both lists have null, or a file is missing or broken, the document goes on without the image, which is
counted.
"""

from typing import Any

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.tasks.media import as_image
from gemma4_jax.data.tasks.text import as_text
from gemma4_jax.errors import InputError

PARAGRAPH = "\n\n"
"""Between two texts without an image between them."""


def interleaved(texts: Any, images: Any) -> Document:
    """A document of which all text is learned. Of an image and a text in one place, the image comes first."""
    lists = isinstance(texts, list) and isinstance(images, list)
    if not lists or len(texts) != len(images):
        lengths = f"{len(texts)} and {len(images)}" if lists else f"{texts!r:.50} and {images!r:.50}"
        raise InputError(f"texts and images must be two lists of one length, with nulls, and are {lengths}.")
    segments: list[Text | Image] = []
    num_missing = 0
    for said, seen in zip(texts, images, strict=True):
        if seen is None or (isinstance(seen, dict) and not any(value is not None for value in seen.values())):
            num_missing += said is None
        else:
            segments.append(_image(seen))
        if said is not None:
            follows_text = bool(segments) and isinstance(segments[-1], Text)
            segments.append(Text(PARAGRAPH * follows_text + as_text(said)))
    return Document(tuple(segments), images_missing=num_missing)


def _image(value: Any) -> Image:
    image = as_image(value)
    if isinstance(image.content, str) and "://" in image.content:
        raise InputError(
            f"the image {image.content!r:.100} is a URL: save the images first, for example by img2dataset."
        )
    return Image(image.content, name=image.name, may_be_missing=True)
