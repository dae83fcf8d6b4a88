"""`Document` to `Example`: token ids, which of them carry loss, and the patches of its images."""

import dataclasses

import numpy as np

from gemma4_jax.config import VisionConfig
from gemma4_jax.data.document import Document, Image, Source, Text
from gemma4_jax.data.images import ImagePatches, cut_patches, decode_image, resize_image
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized document, or a piece of one.

    Attributes:
      tokens: [n] int32; an image of m soft tokens is begin_image, m placeholders, end_image.
      carries_loss: [n] bool, whether the model learns to predict the token.
      images: in the order of their placeholders.
      name: of the document.
      sounds: in the order of their placeholders, [F, M] log-mel features of each.
    """

    tokens: np.ndarray
    carries_loss: np.ndarray
    images: tuple[ImagePatches, ...]
    name: str
    sounds: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands where a record could not be read, so that it is counted and named rather than lost.

    Attributes:
      reason: one sentence that names the record.
    """

    reason: str


@dataclasses.dataclass(frozen=True)
class DocumentTokenizer:
    """Turns documents into examples.

    Attributes:
      tokenizer: of the text.
      vision: of the model that will read the images; None if it reads none.
      max_soft_tokens: budget of an image that brings none of its own, and the most that any may ask for.
    """

    tokenizer: Tokenizer
    vision: VisionConfig | None
    max_soft_tokens: int

    def __call__(self, document: Document) -> Example:
        """Tokenizes one document: <bos>, its segments in order, <eos>.

        Raises:
          InputError: if an image cannot be read, or the model has no vision tower for it.
        """
        roles = self.tokenizer.tokens
        tokens, carries_loss, images = [roles.bos], [False], []
        for segment in document.segments:
            if isinstance(segment, Text):
                ids, loss = self.tokenizer.encode(segment.text), segment.loss
            else:
                images.append(self._image_patches(segment, document.name))
                placeholders = [roles.image] * images[-1].num_soft_tokens
                ids, loss = [roles.begin_image, *placeholders, roles.end_image], False
            tokens += ids
            carries_loss += [loss] * len(ids)
        tokens.append(roles.eos)
        carries_loss.append(True)
        return Example(np.array(tokens, np.int32), np.array(carries_loss), tuple(images), document.name)

    def _image_patches(self, image: Image, name: str) -> ImagePatches:
        try:
            return image_patches(image, self.vision, self.max_soft_tokens)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error


def image_patches(image: Image, vision: VisionConfig | None, max_soft_tokens: int) -> ImagePatches:
    """The patches of one image, resized to its budget.

    Args:
      image: not yet trusted.
      vision: of the model that will read it; None if it reads none.
      max_soft_tokens: budget of an image that brings none of its own, and the most that any may ask for.
    Raises:
      InputError: if it cannot be read, or the model has no vision tower for it.
    """
    if vision is None:
        raise InputError("The model has no vision tower (model.vision is empty), so it cannot read images.")
    budget = image.max_soft_tokens or max_soft_tokens
    if type(budget) is not int or budget not in SOFT_TOKEN_BUDGETS or budget > max_soft_tokens:
        accepted = ", ".join(str(b) for b in SOFT_TOKEN_BUDGETS if b <= max_soft_tokens)
        raise InputError(f"max_soft_tokens={budget!r:.100} of an image must be one of {accepted}.")
    cells = {"patch_size": vision.patch_size, "pooling_size": vision.pooling_size}
    pixels = decode_image(image.content) if isinstance(image.content, bytes) else image.content
    return cut_patches(resize_image(pixels, max_soft_tokens=budget, **cells), **cells)


class TokenizedSource:
    """A source of examples; a record that cannot be read is an `Unreadable`, not an exception."""

    def __init__(self, source: Source, tokenize: DocumentTokenizer) -> None:
        self._source = source
        self._tokenize = tokenize

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example | Unreadable:
        try:
            return self._tokenize(self._source[index])
        except InputError as error:
            return Unreadable(str(error))
