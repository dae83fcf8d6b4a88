"""`Processor`: what a person or a program has at hand, texts, talks, images, sounds or token ids, to a `Batch`."""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax.audio.features import SAMPLE_RATE, num_soft_tokens
from gemma4_jax.batch import Batch
from gemma4_jax.chat import ChatTemplate
from gemma4_jax.config import AudioConfig, VisionConfig
from gemma4_jax.data.assemble import assemble
from gemma4_jax.data.document import Image, Sound
from gemma4_jax.data.encode import Encoder, check_places
from gemma4_jax.data.example import Example
from gemma4_jax.data.images import ImagePatches
from gemma4_jax.data.pack import RowShape, size_of
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer

ImageInput = np.ndarray | PIL.Image.Image | bytes | str | Path
"""An image: what `data.images.read_pixels` reads, pixels, a Pillow image or the bytes of a file; or a file's path."""

AudioInput = np.ndarray | bytes | str | Path
"""A sound: [n] floats, mono, 16,000 a second, within -1 and 1; the bytes of a sound file, or the path of one."""


@dataclasses.dataclass(frozen=True)
class Processor:
    """Makes batches for a model, and text of what it writes.

    Attributes:
      tokenizer: of the model.
      vision: of the model; None if it reads no images.
      max_soft_tokens: budget of an image.
      chat_template: of the model; None if it has none.
      stop_tokens: ids that end what the model writes.
      source: the folder that it was loaded from, and in which tensors lie that the model does not use.
      audio: of the model; None if it hears nothing.
    """

    tokenizer: Tokenizer
    vision: VisionConfig | None
    max_soft_tokens: int = 280
    chat_template: ChatTemplate | None = None
    stop_tokens: tuple[int, ...] = ()
    source: Path | None = None
    audio: AudioConfig | None = None

    def __call__(
        self,
        inputs: str | Sequence[Any] | None = None,
        *,
        images: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        tokens: Sequence[Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Batch:
        """A batch with one row for each input, on the host, ready for the model.

        Args:
          inputs: a text, a conversation (a list of messages, see `ChatTemplate.encode`), or a list of either. In a text
            the names of special tokens are these tokens, <|image|> stands for an image and <|audio|> for a sound, and
            <bos> is put before it if it is not there. An image of a conversation stands in its message,
            {"type": "image", "image": ...}, or among `images`; a sound, {"type": "audio", "audio": ...}, or among
            `audios`.
          images: those of the one input in order, or for a list of inputs a list of such lists. See `ImageInput`.
          audios: sounds, likewise. See `AudioInput`.
          tokens: instead of `inputs`: token ids, or a list of such rows, taken as they are; every soft token of an
            image or a sound has its placeholder.
          tools, add_generation_prompt, variables: of conversations, see `ChatTemplate.encode`. Tools and variables are
            refused beside any other input.
        Returns:
          Batch of numpy arrays. Loss weights are 1 where the model's part of a conversation would be predicted, and on
          every token of texts and `tokens` but the first; on placeholders never.
        Raises:
          InputError: an input, an image or a sound cannot be read, or they do not belong together.
        """
        if (inputs is None) == (tokens is None):
            raise InputError("a processor takes inputs or tokens: give one of them.")
        given: Any = inputs if tokens is None else tokens
        is_single = _is_single(given)
        rows = [given] if is_single else list(given)
        if not rows:
            raise InputError("there is no input: give at least one.")
        options = {**variables} if tools is None else {"tools": tools, **variables}
        if options and (tokens is not None or any(isinstance(row, str) for row in rows)):
            raise InputError(f"{', '.join(options)} cannot be used here: only conversations have tools and variables.")
        media = [
            _of_rows(name, those, len(rows), is_single=is_single)
            for name, those in (("images", images), ("audios", audios))
        ]
        examples = []
        for row, row_images, row_audios in zip(rows, *media, strict=True):
            if tokens is not None or isinstance(row, str):
                read = self._from_text if tokens is None else self._from_tokens
                examples.append(read(row, *(() if given is None else given for given in (row_images, row_audios))))
            else:
                options["add_generation_prompt"] = add_generation_prompt
                examples.append(self._from_messages(row, row_images, row_audios, options))
        roles = self.tokenizer.tokens
        if any(np.isin(example.tokens, roles.video).any() for example in examples):
            raise InputError("an input has a place for a video: a processor reads texts, images and sounds.")
        batch_rows = [[example] for example in examples]
        return assemble(batch_rows, self._row_shape(examples), roles)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens by name."""
        return self.tokenizer.decode(list(tokens))

    def _from_text(self, text: str, images: Sequence[ImageInput], audios: Sequence[AudioInput]) -> Example:
        ids, _ = self.tokenizer.encode_with_ends(text, reads_special_tokens=True)
        if ids[:1] != [self.tokenizer.tokens.bos]:
            ids = [self.tokenizer.tokens.bos, *ids]
        return self._expand(ids, [False] + [True] * (len(ids) - 1), images, audios)

    def _from_messages(
        self,
        messages: Any,
        images: Sequence[ImageInput] | None,
        audios: Sequence[AudioInput] | None,
        options: Mapping[str, Any],
    ) -> Example:
        if self.chat_template is None:
            raise InputError("the model has no chat template (chat_template.jinja): give texts or tokens.")
        images, audios = (
            _inside_or_beside(messages, kind, beside) for kind, beside in (("image", images), ("audio", audios))
        )
        ids, carries_loss = self.chat_template.encode(messages, **options)
        return self._expand(ids, carries_loss, images, audios)

    def _from_tokens(self, tokens: Any, images: Sequence[ImageInput], audios: Sequence[AudioInput]) -> Example:
        try:
            ids = np.asarray(tokens)
        except ValueError:  # of a ragged list
            ids = np.zeros(0)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or ids.min() < 0:
            raise InputError(f"tokens must be rows of token ids, and one is {reprlib.repr(tokens):.100}.")
        if ids.max() >= self.tokenizer.vocab_size:
            raise InputError(f"tokens hold {ids.max()}, and the vocabulary ends at {self.tokenizer.vocab_size - 1}.")
        patches, sounds = self._read(images, audios)
        roles = self.tokenizer.tokens
        media = (
            ("images", roles.image, [image.num_soft_tokens for image in patches]),
            ("sounds", roles.audio, [num_soft_tokens(len(sound)) for sound in sounds]),
        )
        for name, token, sizes in media:
            if (placeholders := np.sum(ids == token)) != sum(sizes):
                raise InputError(
                    f"a row has {placeholders} placeholders, and its {len(sizes)} {name} {sum(sizes)} soft tokens."
                )
        carries_loss = (ids != roles.image) & (ids != roles.audio)
        return Example(ids.astype(np.int32), carries_loss, patches, "tokens", sounds)

    def _expand(
        self,
        ids: list[int],
        carries_loss: list[bool],
        images: Sequence[ImageInput],
        audios: Sequence[AudioInput],
    ) -> Example:
        """Puts in place of each <|image|> and <|audio|> what stands for the soft tokens of its image or sound."""
        check_places(ids, self.tokenizer.tokens, len(images), len(audios))  # before a file is opened
        media = [_named_image(image) for image in images], [_named_sound(audio) for audio in audios]
        return self._encoder().fill(ids, carries_loss, *media, "input").read()

    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.vision, self.max_soft_tokens, self.audio)

    def _read(
        self, images: Sequence[ImageInput], audios: Sequence[AudioInput]
    ) -> tuple[tuple[ImagePatches, ...], tuple[np.ndarray, ...]]:
        """What the towers read of images and sounds."""
        encoder = self._encoder()
        patches = tuple(encoder.size_image(_named_image(image)).read() for image in images)
        return patches, tuple(encoder.size_sound(_named_sound(audio)).read() for audio in audios)

    def _row_shape(self, examples: Sequence[Example]) -> RowShape:
        """The smallest that holds every example."""
        tokens, images, patches, frames = (max(sizes) for sizes in zip(*map(size_of, examples), strict=True))
        patch_dim = self.vision.patch_dim if self.vision else 0
        return RowShape(tokens, images, patches, patch_dim, frames, self.audio.num_mel_bins if self.audio else 0)


def _is_single(given: Any) -> bool:
    """Whether it is one text, conversation or row of ids, and not a list of them."""
    if isinstance(given, str):
        return True
    if not isinstance(given, Sequence | np.ndarray):
        raise InputError(f"an input must be a text, a list of messages, or a list of either, and is {given!r:.100}.")
    return len(given) > 0 and not isinstance(given[0], Sequence) and getattr(given[0], "ndim", 0) == 0


def _of_rows(name: str, given: Sequence[Any] | None, num_rows: int, *, is_single: bool) -> list[Any]:
    """The images or sounds of every row; None where none are given."""
    if given is None:
        return [None] * num_rows
    rows: Any = [given] if is_single else given
    if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple | None) for row in rows):
        one = f"[{name.removesuffix('s')}]"
        raise InputError(f"{name} must be a list for each input: write {name}={one if is_single else f'[{one}, []]'}.")
    if len(rows) != num_rows:
        raise InputError(f"{name} are given for {len(rows)} inputs, and there are {num_rows}.")
    return list(rows)


def _inside_or_beside(messages: Any, kind: str, beside: Sequence[Any] | None) -> Sequence[Any]:
    """The images or sounds of a conversation: inside its messages, or else those beside them."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    inside = [part[kind] for part in parts if isinstance(part, Mapping) and part.get("type") == kind and kind in part]
    if inside and beside is not None:
        raise InputError(f"{kind}s are given both inside the messages and beside them: give each {kind} once.")
    return inside if beside is None else beside


def _named_image(image: ImageInput) -> Image:
    """As in a document; the path of a file is its name."""
    if isinstance(image, str | Path):
        return Image(_read_file("image", image), name=str(image))
    if isinstance(image, np.ndarray | PIL.Image.Image | bytes):
        return Image(image)
    raise InputError(
        f"an image cannot be {type(image).__name__}: give uint8 pixels [height, width, 3], a Pillow image, or a file's "
        "bytes or path."
    )


def _named_sound(audio: AudioInput) -> Sound:
    """As in a document; the path of a file is its name. `log_mel` judges what an array holds."""
    if isinstance(audio, str | Path):
        return Sound(_read_file("sound", audio), name=str(audio))
    if isinstance(audio, np.ndarray | bytes):
        return Sound(audio)
    raise InputError(
        f"a sound cannot be {type(audio).__name__}: give [n] floats, {SAMPLE_RATE} a second, or a file's bytes or path."
    )


def _read_file(what: str, path: str | Path) -> bytes:
    if "://" in str(path):
        raise InputError(f"{what} {path} is a URL, and only files are read: download it first.")
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # a ValueError for a zero byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{what} {path} cannot be read: {reason.lower()}.") from error
