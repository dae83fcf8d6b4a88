"""`Document` to `SizedExample`: token ids, which of them carry loss, and what the towers will read of its images and
sounds."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma4_jax.config import AudioConfig, SpecialTokens, VisionConfig
from gemma4_jax.data.chat_templates import chat_template
from gemma4_jax.data.document import Conversation, Document, Image, Sound, Text
from gemma4_jax.data.example import Example, SizedExample, SizedImage, SizedSound
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

MAX_CHARACTERS = 2**21
"""Characters of text in a document, at most: so many take the tokenizer three seconds and 400 MB."""

MIN_QUESTION = 16
"""Tokens that stay of text without loss which stands alone before what is learned; fewer would be no question."""


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

    def __call__(self, document: Document) -> SizedExample:
        """Encodes one document: <bos>, its segments in order, <eos>, which is learned where the last text is.

        A conversation is what the tokenizer's chat template writes of it, and nothing more. Of sounds and most
        images only the header is read; a damaged one may show when the example is read.

        Raises:
          InputError: if it has too much text, an image or a sound cannot be read, the model has no tower for it, or the
            template fails.
        """
        try:
            if document.encoded is not None:
                return self._checked(document.encoded)
            if document.conversation is not None:
                return self._from_conversation(document, document.conversation)
            return self._from_segments(document)
        except InputError as error:
            raise InputError(f"{document.name}: {error}") from error

    def _checked(self, example: SizedExample) -> SizedExample:
        """An example from a file, which nobody vouches for.

        Raises:
          InputError: it is none that this encoder can have made.
        """
        tokens, cell = example.text.tokens, self.vision.pooling_size if self.vision else 0
        is_known = len(tokens) and tokens.min() >= 0 and tokens.max() < self.tokenizer.vocab_size
        fits = all(
            image.max_soft_tokens <= self.max_soft_tokens
            and image.height % cell == image.width % cell == 0 < image.num_soft_tokens <= image.max_soft_tokens
            for image in example.images
        )
        for placeholder, begin, end, sizes in _media(self.tokenizer.tokens, example.images, example.sounds):
            edges = np.flatnonzero(np.diff(np.r_[False, tokens == placeholder, False]))
            starts, stops = edges[::2], edges[1::2]
            fits = fits and (stops - starts).tolist() == [size for size in sizes if size]
            fits = fits and (tokens[starts - 1] == begin).all() and (tokens[stops % len(tokens)] == end).all()
        if not (is_known and fits):
            raise InputError("its record is damaged: its tokens are not those of its texts, images and sounds.")
        return dataclasses.replace(example, image_token=self.tokenizer.tokens.image)

    def _from_conversation(self, document: Document, conversation: Conversation) -> SizedExample:
        _check_length(_num_characters([conversation.messages, conversation.tools]))
        template = chat_template(self.tokenizer)
        ids, carries_loss = template.encode(conversation.messages, tools=conversation.tools, videos=conversation.videos)
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
    ) -> SizedExample:
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
        sized = tuple(map(self.size_image, images))
        heard = tuple(map(self.size_sound, sounds))
        text = Example(*expand(ids, carries_loss, sized, heard, roles), (), name)
        return SizedExample(text, sized, roles.image, heard)

    def _from_segments(self, document: Document) -> SizedExample:
        _check_length(sum(len(segment.text) for segment in document.segments if isinstance(segment, Text)))
        roles = self.tokenizer.tokens
        tokens, carries_loss = [roles.bos], [False]
        images: list[SizedImage] = []
        sounds: list[SizedSound] = []
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
                        images.append(self.size_image(segment))
                    except InputError:
                        if self.vision is None or not segment.may_be_missing:
                            raise
                        num_missing += 1
                        continue
                    ids = [roles.image]
                else:
                    sounds.append(self.size_sound(segment))
                    ids = [roles.audio]
            tokens += ids
            carries_loss += [loss] * len(ids)
        tokens.append(roles.eos)
        carries_loss.append(is_learned)
        arrays = expand(tokens, carries_loss, images, sounds, roles)
        context = _context(leading)
        text = Example(*arrays, (), document.name, context=context, images_missing=num_missing)
        return SizedExample(text, tuple(images), roles.image, tuple(sounds))

    def size_image(self, image: Image) -> SizedImage:
        """One image with its size, as it will be when it is resized to its budget.

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
            return SizedImage.of(
                image.content,
                patch_size=self.vision.patch_size,
                pooling_size=self.vision.pooling_size,
                max_soft_tokens=budget,
                name=image.name,
                may_be_missing=image.may_be_missing,
            )
        except InputError as error:
            raise InputError(f"{image.name}: {error}" if image.name else str(error)) from error

    def size_sound(self, sound: Sound) -> SizedSound:
        """One sound with its length.

        Raises:
          InputError: if it cannot be read, or the model has no audio tower for it.
        """
        try:
            if self.audio is None:
                raise InputError("The model has no audio tower (model.audio is empty), so it cannot hear sounds.")
            if isinstance(sound.content, str):
                raise InputError("a sound is a path, and its source has no files: give its bytes or samples.")
            return SizedSound.of(
                sound.content, mel_bins=self.audio.num_mel_bins, seconds=sound.seconds, name=sound.name
            )
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
    images: Sequence[SizedImage],
    sounds: Sequence[SizedSound],
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
    kinds = _media(roles, images, sounds)
    for placeholder, _, _, sizes in kinds:
        lengths[short == placeholder] = np.array(sizes, int) + 2
    long = np.repeat(short, lengths)
    is_learned = np.repeat(np.array(carries_loss, bool) & (lengths == 1), lengths)
    stops = np.cumsum(lengths)
    for placeholder, begin, end, _ in kinds:
        here = short == placeholder
        long[(stops - lengths)[here]], long[stops[here] - 1] = begin, end
    return long, is_learned


def _media(
    roles: SpecialTokens, images: Sequence[SizedImage], sounds: Sequence[SizedSound]
) -> tuple[tuple[int, int, int, list[int]], ...]:
    """Of images, then of sounds: (placeholder, mark before, mark behind, soft tokens of each)."""
    return (
        (roles.image, roles.begin_image, roles.end_image, [image.num_soft_tokens for image in images]),
        (roles.audio, roles.begin_audio, roles.end_audio, [sound.num_soft_tokens for sound in sounds]),
    )


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
