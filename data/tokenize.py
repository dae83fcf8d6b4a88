"""`Document` to `Example`: token ids, which of them carry loss, and the patches of its images."""

import dataclasses

import numpy as np

from gemma4_jax.config import VisionConfig
from gemma4_jax.data.document import Document, Image, Source, Text
from gemma4_jax.data.images import ImagePatches, cut_patches, read_pixels, resize_image
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

MAX_CHARACTERS = 2**21
"""Characters of text in a document, at most: so many take the tokenizer three seconds and 400 MB."""

MIN_QUESTION = 16
"""Tokens that stay of text without loss which stands alone before what is learned; fewer would be no question."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized document, or a piece of one.

    Attributes:
      tokens: [n] int32; an image of m soft tokens is begin_image, m placeholders, end_image.
      carries_loss: [n] bool, whether the model learns to predict the token.
      images: in the order of their placeholders.
      name: of the document.
      sounds: in the order of their placeholders, [F, M] log-mel features of each.
      source: that the document comes from, by its name in the mixture.
      context: tokens after <bos> that may be cut from the left to make the document fit.
    """

    tokens: np.ndarray
    carries_loss: np.ndarray
    images: tuple[ImagePatches, ...]
    name: str
    sounds: tuple[np.ndarray, ...] = ()
    source: str = ""
    context: int = 0


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands where a record could not be read, so that it is counted and named rather than lost.

    Attributes:
      reason: one sentence that names the record.
      source: as in `Example`.
    """

    reason: str
    source: str = ""


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
        """Tokenizes one document: <bos>, its segments in order, <eos>, which is learned where the last text is.

        Raises:
          InputError: if it has too much text, an image cannot be read, or the model has no vision tower for it.
        """
        try:
            return self._example(document)
        except InputError as error:
            raise InputError(f"{document.name}: {error}") from error

    def _example(self, document: Document) -> Example:
        characters = sum(len(segment.text) for segment in document.segments if isinstance(segment, Text))
        if characters > MAX_CHARACTERS:
            raise InputError(f"a document of {characters} characters is refused: at most {MAX_CHARACTERS} are read.")
        roles = self.tokenizer.tokens
        tokens, carries_loss, images = [roles.bos], [False], []
        leading: list[int] = []  # lengths of the texts before the first image or learned text
        is_leading, is_learned = True, False  # <eos> alone is nothing to learn
        for segment in document.segments:
            if isinstance(segment, Text):
                ids, loss = self.tokenizer.encode(segment.text), segment.loss
                is_leading, is_learned = is_leading and not loss, loss if ids else is_learned
                if is_leading and ids:
                    leading.append(len(ids))
            else:
                is_leading = False
                images.append(image_patches(segment, self.vision, self.max_soft_tokens))
                placeholders = [roles.image] * images[-1].num_soft_tokens
                ids, loss = [roles.begin_image, *placeholders, roles.end_image], False
            tokens += ids
            carries_loss += [loss] * len(ids)
        tokens.append(roles.eos)
        carries_loss.append(is_learned)
        arrays = np.array(tokens, np.int32), np.array(carries_loss)
        return Example(*arrays, tuple(images), document.name, context=_context(leading))


def _context(leading: list[int]) -> int:
    """How much of texts of these lengths, before what is learned, may go: all but the last, which is the question."""
    return sum(leading[:-1]) if len(leading) > 1 else max(0, sum(leading) - MIN_QUESTION)


def image_patches(image: Image, vision: VisionConfig | None, max_soft_tokens: int) -> ImagePatches:
    """The patches of one image, resized to its budget.

    Args:
      image: not yet trusted.
      vision: of the model that will read it; None if it reads none.
      max_soft_tokens: budget of an image that brings none of its own, and the most that any may ask for.
    Raises:
      InputError: if it cannot be read, or the model has no vision tower for it.
    """
    try:
        if vision is None:
            raise InputError("the model has no vision tower (model.vision is empty), so it cannot read images.")
        budget = max_soft_tokens if image.max_soft_tokens is None else image.max_soft_tokens
        if type(budget) is not int or budget not in SOFT_TOKEN_BUDGETS or budget > max_soft_tokens:
            accepted = ", ".join(str(b) for b in SOFT_TOKEN_BUDGETS if b <= max_soft_tokens)
            raise InputError(f"max_soft_tokens={budget!r:.100} of an image must be one of {accepted}.")
        cells = {"patch_size": vision.patch_size, "pooling_size": vision.pooling_size}
        return cut_patches(resize_image(read_pixels(image.content), max_soft_tokens=budget, **cells), **cells)
    except InputError as error:
        raise InputError(f"{image.name}: {error}" if image.name else str(error)) from error


class TokenizedSource:
    """A source of examples; a record that cannot be read is an `Unreadable`, not an exception.

    Args:
      name: of the source in the mixture.
      source: of documents.
      tokenize: makes examples of them.
    """

    def __init__(self, name: str, source: Source, tokenize: DocumentTokenizer) -> None:
        self._name = name
        self._source = source
        self._tokenize = tokenize

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example | Unreadable:
        try:
            return dataclasses.replace(self._tokenize(self._source[index]), source=self._name)
        except InputError as error:
            return Unreadable(str(error), self._name)
