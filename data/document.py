"""`Document`: what every record becomes before it is encoded."""

import dataclasses

import numpy as np
import PIL.Image


@dataclasses.dataclass(frozen=True)
class Text:
    """A stretch of text.

    Attributes:
      text: any string; the names of special tokens in it are plain characters.
      loss: whether the model learns to write it.
    """

    text: str
    loss: bool = True


@dataclasses.dataclass(frozen=True)
class Image:
    """An image where it stands in a document.

    Attributes:
      content: what `data.images.read_pixels` reads, not yet trusted: pixels, or the bytes of an image file; or the path
        of a file beside the records, which `data.documents` reads.
      max_soft_tokens: budget of this image; None is the run's `data.soft_tokens_per_image`.
      name: of its file, for messages; empty if it has none.
    """

    content: np.ndarray | PIL.Image.Image | bytes | str
    max_soft_tokens: int | None = None
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Sound:
    """A sound where it stands in a document.

    Attributes:
      content: [n] floats, mono, 16,000 a second, within -1 and 1; the bytes of a WAV file; or a path, as in `Image`.
      name: of its file, for messages; empty if it has none.
    """

    content: np.ndarray | bytes | str
    name: str = ""


Segment = Text | Image | Sound


@dataclasses.dataclass(frozen=True)
class Document:
    """Texts, images and sounds in reading order.

    Attributes:
      segments: the parts, in order.
      name: of the record that it was made of, for messages; tasks leave it to `data.documents`.
    """

    segments: tuple[Segment, ...]
    name: str = ""
