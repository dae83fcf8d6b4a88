"""`Document`, or `Pair` of two: what every record becomes before it is encoded."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax.data.example import SizedExample


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
      may_be_missing: whether the document goes on without it where it cannot be read.
    """

    content: np.ndarray | PIL.Image.Image | bytes | str
    max_soft_tokens: int | None = None
    name: str = ""
    may_be_missing: bool = False


@dataclasses.dataclass(frozen=True)
class Sound:
    """A sound where it stands in a document.

    Attributes:
      content: [n] floats, mono, 16,000 a second, within -1 and 1; the bytes of a sound file; or a path, as in `Image`.
      name: of its file, for messages; empty if it has none.
      seconds: the stretch of it that is meant, (first, behind the last); None for all.
    """

    content: np.ndarray | bytes | str
    name: str = ""
    seconds: tuple[int, int] | None = None


Segment = Text | Image | Sound


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages that the chat template of the model's tokenizer is to write, which `data.encode` knows and tasks do not.

    Attributes:
      messages: as `ChatTemplate.encode` takes them; {"type": "image"} and {"type": "audio"} stand for the segments of
        the document, in their order, and {"type": "video"} for as many images as it has times.
      tools: JSON schemas of functions; None if there are none.
      num_learned: so many of the last turns of the model carry loss; None for all.
      videos: the times of the frames of each.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    num_learned: int | None = None
    videos: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Document:
    """Texts, images and sounds in reading order.

    Attributes:
      segments: the parts, in order; of a conversation, its images and sounds alone.
      name: of the record that it was made of, for messages; tasks leave it to `data.documents`.
      conversation: None of a document that is no chat.
      images_missing: images that it is known to have had, and has not.
      encoded: what a document is that was encoded when its source was prepared; it has nothing else.
    """

    segments: tuple[Segment, ...]
    name: str = ""
    conversation: Conversation | None = None
    images_missing: int = 0
    encoded: SizedExample | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt: documents that begin alike.

    Attributes:
      chosen, rejected: the prompt and an answer each, the better and the worse: conversations, or one text each.
      num_prompt: messages of the prompt, or characters of a text.
    """

    chosen: Document
    rejected: Document
    num_prompt: int
