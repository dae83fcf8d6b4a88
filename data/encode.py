"""`Document` to `Example`: token ids, which of them carry loss, and what the towers read of its images and sounds."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma4_jax.audio.features import log_mel, num_soft_tokens
from gemma4_jax.config import AudioConfig, SpecialTokens, VisionConfig
from gemma4_jax.data.document import Document, Image, Sound, Text
from gemma4_jax.data.images import ImagePatches, cut_patches, read_pixels, resize_image
from gemma4_jax.data.sounds import decode_wav
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

MAX_CHARACTERS = 2**21
"""Characters of text in a document, at most: so many take the tokenizer three seconds and 400 MB."""

MIN_QUESTION = 16
"""Tokens that stay of text without loss which stands alone before what is learned; fewer would be no question."""


@dataclasses.dataclass(frozen=True)
class Example:
    """An encoded document, or a piece of one.

    Attributes:
      tokens: [n] int32; an image of m soft tokens is begin_image, m placeholders, end_image, and a sound likewise.
      carries_loss: [n] bool, whether the model learns to predict the token.
      images: in the order of their placeholders.
      name: of the document.
      sounds: in the order of their placeholders, [F, M] log-mel features of each.
      source: that the document comes from, by its name in `data.sources`.
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
class Encoder:
    """Turns documents into examples.

    Attributes:
      tokenizer: of the text.
      vision: of the model that will read the images; None if it reads none.
      max_soft_tokens: budget of an image that brings none of its own, and the most that any may ask for.
      audio: of the model that will hear the sounds; None if it hears none.
    """

    tokenizer: Tokenizer
    vision: VisionConfig | None
    max_soft_tokens: int
    audio: AudioConfig | None = None

    def __call__(self, document: Document) -> Example:
        """Encodes one document: <bos>, its segments in order, <eos>, which is learned where the last text is.

        Raises:
          InputError: if it has too much text, an image or a sound cannot be read, or the model has no tower for it.
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
        tokens, carries_loss = [roles.bos], [False]
        images, sounds = [], []
        leading: list[int] = []  # lengths of the texts before the first image, sound or learned text
        is_leading, is_learned = True, False  # <eos> alone is nothing to learn
        for segment in document.segments:
            if isinstance(segment, Text):
                ids, loss = self.tokenizer.encode(segment.text), segment.loss
                is_leading, is_learned = is_leading and not loss, loss if ids else is_learned
                if is_leading and ids:
                    leading.append(len(ids))
            else:
                is_leading, loss = False, False
                if isinstance(segment, Image):
                    images.append(self.read_image(segment))
                    ids = [roles.image]
                else:
                    sounds.append(self.read_sound(segment))
                    ids = [roles.audio]
            tokens += ids
            carries_loss += [loss] * len(ids)
        tokens.append(roles.eos)
        carries_loss.append(is_learned)
        arrays = expand(tokens, carries_loss, images, sounds, roles)
        return Example(*arrays, tuple(images), document.name, tuple(sounds), context=_context(leading))

    def read_image(self, image: Image) -> ImagePatches:
        """The patches of one image, resized to its budget.

        Raises:
          InputError: if it cannot be read, or the model has no vision tower for it.
        """
        try:
            if self.vision is None:
                raise InputError("the model has no vision tower (model.vision is empty), so it cannot read images.")
            budget = self.max_soft_tokens if image.max_soft_tokens is None else image.max_soft_tokens
            if type(budget) is not int or budget not in SOFT_TOKEN_BUDGETS or budget > self.max_soft_tokens:
                accepted = ", ".join(str(b) for b in SOFT_TOKEN_BUDGETS if b <= self.max_soft_tokens)
                raise InputError(f"max_soft_tokens={budget!r:.100} of an image must be one of {accepted}.")
            if isinstance(image.content, str):
                raise InputError("an image is a path, and its source has no files: give its bytes or pixels.")
            cells = {"patch_size": self.vision.patch_size, "pooling_size": self.vision.pooling_size}
            return cut_patches(resize_image(read_pixels(image.content), max_soft_tokens=budget, **cells), **cells)
        except InputError as error:
            raise InputError(f"{image.name}: {error}" if image.name else str(error)) from error

    def read_sound(self, sound: Sound) -> np.ndarray:
        """The [F, M] log-mel features of one sound.

        Raises:
          InputError: if it cannot be read, or the model has no audio tower for it.
        """
        try:
            if self.audio is None:
                raise InputError("The model has no audio tower (model.audio is empty), so it cannot hear sounds.")
            if isinstance(sound.content, str):
                raise InputError("a sound is a path, and its source has no files: give its bytes or samples.")
            samples = decode_wav(sound.content) if isinstance(sound.content, bytes) else sound.content
            return log_mel(samples, self.audio.num_mel_bins)
        except InputError as error:
            raise InputError(f"{sound.name}: {error}" if sound.name else str(error)) from error


def expand(
    tokens: Sequence[int],
    carries_loss: Sequence[bool],
    images: Sequence[ImagePatches],
    sounds: Sequence[np.ndarray],
    roles: SpecialTokens,
) -> tuple[np.ndarray, np.ndarray]:
    """Makes room for soft tokens: one placeholder becomes as many as its image or sound has, between its two marks.

    Args:
      tokens: [n] ids, with one placeholder for each image and each sound, in their order.
      carries_loss: [n], whether the model learns to predict the token; placeholders and marks are never learned.
      images, sounds: what stands there.
      roles: ids of placeholders and marks.
    Returns:
      (tokens [N] int32, carries_loss [N] bool).
    """
    short = np.array(tokens, np.int32)
    lengths = np.ones(len(short), int)
    kinds = (
        (roles.image, roles.begin_image, roles.end_image, [image.num_soft_tokens for image in images]),
        (roles.audio, roles.begin_audio, roles.end_audio, [num_soft_tokens(len(sound)) for sound in sounds]),
    )
    for placeholder, _, _, sizes in kinds:
        lengths[short == placeholder] = np.array(sizes, int) + 2
    long = np.repeat(short, lengths)
    is_learned = np.repeat(np.array(carries_loss, bool) & (lengths == 1), lengths)
    stops = np.cumsum(lengths)
    for placeholder, begin, end, _ in kinds:
        here = short == placeholder
        long[(stops - lengths)[here]], long[stops[here] - 1] = begin, end
    return long, is_learned


def _context(leading: list[int]) -> int:
    """How much of texts of these lengths, before what is learned, may go: all but the last, which is the question."""
    return sum(leading[:-1]) if len(leading) > 1 else max(0, sum(leading) - MIN_QUESTION)
