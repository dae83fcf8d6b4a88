"""`Document`: the one record type that every source yields."""

import dataclasses
from typing import Any, Protocol

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
      content: what `data.images.read_pixels` reads, not yet trusted: pixels, or the bytes of an image file.
      max_soft_tokens: budget of this image; None is the run's `data.soft_tokens_per_image`.
      name: of its file, for messages; empty if it has none.
    """

    content: np.ndarray | PIL.Image.Image | bytes
    max_soft_tokens: int | None = None
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Document:
    """Text and images in reading order.

    Attributes:
      segments: the parts, in order.
      name: where the document comes from, for messages; unique within its source.
    """

    segments: tuple[Text | Image, ...]
    name: str


class Source(Protocol):
    """Documents by index. `source[i]` is the same document whenever and wherever it is asked for.

    `source[i]` may raise InputError for a record that cannot be read: the pipeline counts and skips it.
    `fingerprint()` is what the documents are known by, whatever place they are read from: a JSON object of names and
    values that differs where the documents do. A run that goes on compares it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def fingerprint(self) -> dict[str, Any]: ...
