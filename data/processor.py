"""`Processor`: what a person or a program has at hand, texts, conversations, images or token ids, to a `Batch`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax.batch import Batch
from gemma4_jax.chat import ChatTemplate
from gemma4_jax.config import VisionConfig
from gemma4_jax.data.assemble import assemble
from gemma4_jax.data.document import Image
from gemma4_jax.data.images import ImagePatches
from gemma4_jax.data.pack import RowShape, size_of
from gemma4_jax.data.tokenize import Example, image_patches
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer

ImageInput = np.ndarray | PIL.Image.Image | bytes | str | Path
"""An image: pixels uint8 [height, width, 3], a Pillow image, the bytes of a file, or the path of one."""


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
    """

    tokenizer: Tokenizer
    vision: VisionConfig | None
    max_soft_tokens: int = 280
    chat_template: ChatTemplate | None = None
    stop_tokens: tuple[int, ...] = ()
    source: Path | None = None

    def __call__(
        self,
        inputs: str | Sequence[Any] | None = None,
        *,
        images: Sequence[Any] | None = None,
        tokens: Sequence[Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Batch:
        """A batch with one row for each input, on the host, ready for the model.

        Args:
          inputs: a text, a conversation (a list of messages, see `ChatTemplate.encode`), or a list of either. In a text
            the names of special tokens are these tokens, <|image|> stands for an image, and <bos> is put before it if
            it is not there. An image of a conversation stands in its message, {"type": "image", "image": ...}, or
            among `images`.
          images: those of the one input in order, or for a list of inputs a list of such lists. See `ImageInput`.
          tokens: instead of `inputs`: token ids, or a list of such rows, taken as they are; every soft token of an
            image has its placeholder.
          tools, add_generation_prompt, variables: of conversations, see `ChatTemplate.encode`.
        Returns:
          Batch of numpy arrays. Loss weights are 1 where the model's part of a conversation would be predicted, and on
          every token of texts and `tokens` but the first; on placeholders never.
        Raises:
          InputError: an input or an image cannot be read, or they do not belong together.
        """
        if (inputs is None) == (tokens is None):
            raise InputError("a processor takes inputs or tokens: give one of them.")
        given: Any = inputs if tokens is None else tokens
        is_single = _is_single(given)
        rows = [given] if is_single else list(given)
        if not rows:
            raise InputError("there is no input: give at least one.")
        if images is None:
            images_of_rows: list[Any] = [None] * len(rows)
        else:
            images_of_rows = [images] if is_single else list(images)
        if len(images_of_rows) != len(rows):
            raise InputError(f"images are given for {len(images_of_rows)} inputs, and there are {len(rows)}.")
        examples = []
        for row, row_images in zip(rows, images_of_rows, strict=True):
            if tokens is not None:
                examples.append(self._from_tokens(row, row_images or ()))
            elif isinstance(row, str):
                examples.append(self._from_text(row, row_images or ()))
            else:
                options = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
                examples.append(self._from_messages(row, row_images, options))
        roles = self.tokenizer.tokens
        if any(np.isin(example.tokens, (roles.audio, roles.video)).any() for example in examples):
            raise InputError("an input has a place for a sound or a video: a processor reads texts and images.")
        return assemble([[example] for example in examples], self._row_shape(examples), roles.image)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens by name."""
        return self.tokenizer.decode(list(tokens))

    def _from_text(self, text: str, images: Sequence[ImageInput]) -> Example:
        ids, _ = self.tokenizer.encode_with_offsets(text, reads_special_tokens=True)
        if ids[:1] != [self.tokenizer.tokens.bos]:
            ids = [self.tokenizer.tokens.bos, *ids]
        return self._expand(ids, [False] + [True] * (len(ids) - 1), images)

    def _from_messages(self, messages: Any, images: Sequence[ImageInput] | None, options: Mapping[str, Any]) -> Example:
        if self.chat_template is None:
            raise InputError("the model has no chat template (chat_template.jinja): give texts or tokens.")
        inside = [image for message in messages for image in _images_of(message)]
        if inside and images is not None:
            raise InputError("images are given both inside the messages and beside them: give each image once.")
        ids, carries_loss = self.chat_template.encode(messages, **options)
        return self._expand(ids, carries_loss, inside if images is None else images)

    def _from_tokens(self, tokens: Any, images: Sequence[ImageInput]) -> Example:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or ids.min() < 0:
            raise InputError(f"tokens must be rows of token ids, and one is {tokens!r:.100}.")
        if ids.max() >= self.tokenizer.vocab_size:
            raise InputError(f"tokens hold {ids.max()}, and the vocabulary ends at {self.tokenizer.vocab_size - 1}.")
        patches = tuple(self._patches(image) for image in images)
        is_placeholder = ids == self.tokenizer.tokens.image
        wanted = sum(image.num_soft_tokens for image in patches)
        if is_placeholder.sum() != wanted:
            raise InputError(
                f"a row has {is_placeholder.sum()} placeholders, and its {len(patches)} images {wanted} soft tokens."
            )
        return Example(ids.astype(np.int32), ~is_placeholder, patches, "tokens")

    def _expand(self, ids: list[int], carries_loss: list[bool], images: Sequence[ImageInput]) -> Example:
        """Puts in place of each <|image|> what stands for the soft tokens of its image."""
        roles = self.tokenizer.tokens
        if ids.count(roles.image) != len(images):
            raise InputError(f"an input has {ids.count(roles.image)} places for images, and {len(images)} are given.")
        patches = tuple(self._patches(image) for image in images)
        coming = iter(patches)
        tokens: list[int] = []
        mask: list[bool] = []
        for token, is_ours in zip(ids, carries_loss, strict=True):
            run = [token]
            if token == roles.image:
                run = [roles.begin_image, *[roles.image] * next(coming).num_soft_tokens, roles.end_image]
            tokens += run
            mask += [is_ours and token != roles.image] * len(run)
        return Example(np.array(tokens, np.int32), np.array(mask), patches, "input")

    def _patches(self, image: ImageInput) -> ImagePatches:
        return image_patches(Image(_content(image)), self.vision, self.max_soft_tokens)

    def _row_shape(self, examples: Sequence[Example]) -> RowShape:
        """The smallest that holds every example."""
        tokens, images, patches = (max(sizes) for sizes in zip(*map(size_of, examples), strict=True))
        longest = max((len(image.patches) for example in examples for image in example.images), default=0)
        return RowShape(tokens, images, patches, longest, 0 if self.vision is None else self.vision.patch_dim)


def _is_single(given: Any) -> bool:
    """Whether it is one text, conversation or row of ids, and not a list of them."""
    if isinstance(given, str):
        return True
    if not isinstance(given, Sequence | np.ndarray):
        raise InputError(f"an input must be a text, a list of messages, or a list of either, and is {given!r:.100}.")
    return len(given) > 0 and (
        isinstance(given[0], Mapping) or (np.ndim(given[0]) == 0 and not isinstance(given[0], str))
    )


def _images_of(message: Any) -> list[ImageInput]:
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list | tuple) else []
    images = [part["image"] for part in parts if part.get("type") == "image" and "image" in part]
    return images


def _content(image: ImageInput) -> np.ndarray | bytes:
    """Pixels, or the bytes of an image file."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise InputError(f"image {image} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    if isinstance(image, PIL.Image.Image):
        return np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    what = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    raise InputError(
        f"an image cannot be {what}: give uint8 pixels [height, width, 3], a Pillow image, or a file's bytes or path."
    )
