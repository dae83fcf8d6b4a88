"""`Document` to `Example`: token ids, which of them carry loss, and what the towers read of its images and sounds."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma4_jax.audio.features import log_mel, num_soft_tokens
from gemma4_jax.config import AudioConfig, SpecialTokens, VisionConfig
from gemma4_jax.data.chat_templates import chat_template
from gemma4_jax.data.document import Conversation, Document, Image, Sound, Text
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
      images_missing: images that the document goes on without.
    """

    tokens: np.ndarray
    carries_loss: np.ndarray
    images: tuple[ImagePatches, ...]
    name: str
    sounds: tuple[np.ndarray, ...] = ()
    source: str = ""
    context: int = 0
    images_missing: int = 0


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

        A conversation is what the tokenizer's chat template writes of it, and nothing more.

        Raises:
          InputError: if it has too much text, an image or a sound cannot be read, the model has no tower for it, or the
            template fails.
        """
        try:
            if document.conversation is not None:
                return self._from_conversation(document, document.conversation)
            return self._from_segments(document)
        except InputError as error:
            raise InputError(f"{document.name}: {error}") from error

    def _from_conversation(self, document: Document, conversation: Conversation) -> Example:
        _check_length(_num_characters([conversation.messages, conversation.tools]))
        ids, carries_loss = chat_template(self.tokenizer).encode(conversation.messages, tools=conversation.tools)
        if conversation.num_learned is not None:
            carries_loss = _last_stretches(carries_loss, conversation.num_learned)
        images = [segment for segment in document.segments if isinstance(segment, Image)]
        sounds = [segment for segment in document.segments if isinstance(segment, Sound)]
        return self.fill(ids, carries_loss, images, sounds, document.name)

    def fill(
        self,
        ids: Sequence[int],
        carries_loss: Sequence[bool],
        images: Sequence[Image],
        sounds: Sequence[Sound],
        name: str,
    ) -> Example:
        """The example of tokens in which one <|image|> stands for each image, and one <|audio|> for each sound.

        Args:
          ids: [n] token ids.
          carries_loss: [n], whether the model learns to predict the token.
          images, sounds: in the order of their places.
          name: of the example.
        Raises:
          InputError: there are more of them than places, or fewer; one cannot be read, or the model has no tower for
            it.
        """
        roles = self.tokenizer.tokens
        check_places(ids, roles, len(images), len(sounds))
        patches = tuple(map(self.read_image, images))
        features = tuple(map(self.read_sound, sounds))
        return Example(*expand(ids, carries_loss, patches, features, roles), patches, name, features)

    def _from_segments(self, document: Document) -> Example:
        _check_length(sum(len(segment.text) for segment in document.segments if isinstance(segment, Text)))
        roles = self.tokenizer.tokens
        tokens, carries_loss = [roles.bos], [False]
        images, sounds = [], []
        leading: list[int] = []  # lengths of the texts before the first image, sound or learned text
        is_leading, is_learned = True, False  # <eos> alone is nothing to learn
        num_missing = document.images_missing
        for segment in document.segments:
            if isinstance(segment, Text):
                ids, loss = self.tokenizer.encode(segment.text), segment.loss
                is_leading, is_learned = is_leading and not loss, loss if ids else is_learned
                if is_leading and ids:
                    leading.append(len(ids))
            else:
                is_leading, loss = False, False
                if isinstance(segment, Image):
                    try:
                        images.append(self.read_image(segment))
                    except InputError:
                        if self.vision is None or not segment.may_be_missing:
                            raise
                        num_missing += 1
                        continue
                    ids = [roles.image]
                else:
                    sounds.append(self.read_sound(segment))
                    ids = [roles.audio]
            tokens += ids
            carries_loss += [loss] * len(ids)
        tokens.append(roles.eos)
        carries_loss.append(is_learned)
        arrays = expand(tokens, carries_loss, images, sounds, roles)
        context = _context(leading)
        return Example(
            *arrays, tuple(images), document.name, tuple(sounds), context=context, images_missing=num_missing
        )

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


def check_places(ids: Sequence[int], roles: SpecialTokens, num_images: int, num_sounds: int) -> None:
    """Refuses tokens that have not one placeholder for each image and each sound.

    Raises:
      InputError: they have more, or fewer.
    """
    kinds = ("image", "images", roles.image, num_images), ("audio", "sounds", roles.audio, num_sounds)
    for kind, what, token, given in kinds:
        if (places := list(ids).count(token)) != given:
            raise InputError(
                f"an input has {places} places for {what}, and {given} are given: write <|{kind}|> in a text, or "
                f'{{"type": "{kind}"}} in a message, where each of them stands.'
            )


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


def _check_length(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise InputError(f"a document of {characters} characters is refused: at most {MAX_CHARACTERS} are read.")


def _num_characters(value: Any) -> int:
    """Of all texts in a conversation, wherever they stand."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_characters, [*value, *value.values()]))
    return sum(map(_num_characters, value)) if isinstance(value, list | tuple) else 0


def _last_stretches(carries_loss: Sequence[bool], number: int) -> list[bool]:
    """Only the last stretches of what carries loss, so many: each is one turn of the model."""
    mask = np.array(carries_loss, bool)
    starts = np.flatnonzero(mask & ~np.r_[False, mask[:-1]])
    mask[: starts[-number] if 0 < number <= len(starts) else 0] = False
    return mask.tolist()
