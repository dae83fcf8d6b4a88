"""Encoded documents: before their images and sounds are read, when only the sizes of these are known, and after."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax.audio.features import log_mel, num_frames, num_soft_tokens
from gemma4_jax.data.cache import Cache
from gemma4_jax.data.image_sizes import upright_size
from gemma4_jax.data.images import ImagePatches, patch_positions, read_patches
from gemma4_jax.data.sounds import num_samples, read_samples
from gemma4_jax.errors import InputError
from gemma4_jax.vision.geometry import resized_size


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
class StoredArray:
    """What a tower reads of an image or a sound, in a file that was prepared: patches, or log-mel features.

    Attributes:
      path: of the file.
      offset: of its first byte in that.
      nbytes: that the image or the sound had before it was prepared. While it waits it counts as much, so that a row
        chooses among the same documents.
      damage: why it could not be read when it was prepared; empty if it could.
    """

    path: Path
    offset: int
    nbytes: int
    damage: str = ""

    def read(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The array.

        Raises:
          InputError: it cannot be read, or the image or sound never could.
        """
        if self.damage:
            raise InputError(self.damage)
        array = np.empty(shape, dtype)
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                num_bytes = file.readinto(array.data)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}.") from error
        if num_bytes != array.nbytes:
            raise InputError(f"{self.path} is damaged: it ends within an image or a sound.")
        return array


@dataclasses.dataclass(frozen=True)
class SizedImage:
    """An image of which the size is known, and the pixels are still in its file.

    Attributes:
      content: what `images.read_patches` reads, or where its patches are.
      height, width: in patches, when it is resized to its budget.
      patch_size, pooling_size: of the tower.
      max_soft_tokens: its budget.
      name: of its file, for messages; empty if it has none.
      may_be_missing: whether the document goes on without it where it cannot be read.
    """

    content: np.ndarray | PIL.Image.Image | bytes | StoredArray
    height: int
    width: int
    patch_size: int
    pooling_size: int
    max_soft_tokens: int
    name: str = ""
    may_be_missing: bool = False

    @classmethod
    def of(
        cls,
        content: np.ndarray | PIL.Image.Image | bytes,
        *,
        patch_size: int,
        pooling_size: int,
        max_soft_tokens: int,
        name: str = "",
        may_be_missing: bool = False,
    ) -> "SizedImage":
        """The image with its size, which the header of most files tells.

        Raises:
          InputError: it cannot be read, as far as that shows.
        """
        cells = {"patch_size": patch_size, "pooling_size": pooling_size, "max_soft_tokens": max_soft_tokens}
        height, width = (side // patch_size for side in resized_size(*upright_size(content), **cells))
        return cls(content, height, width, **cells, name=name, may_be_missing=may_be_missing)

    @property
    def num_patches(self) -> int:
        """That the tower reads."""
        return self.height * self.width

    @property
    def num_soft_tokens(self) -> int:
        """That the tower makes of them."""
        return self.num_patches // self.pooling_size**2

    @property
    def num_bytes(self) -> int:
        """Of memory, while it waits to be read."""
        if isinstance(self.content, bytes):
            return len(self.content)
        if isinstance(self.content, PIL.Image.Image):
            return 4 * int(np.prod(self.content.size))
        return self.content.nbytes

    def read(self, cache: Cache | None = None) -> ImagePatches:
        """Its patches.

        Args:
          cache: keeps those of files; None if nothing does.
        Raises:
          InputError: it cannot be decoded, or its header told another size.
        """
        array = (self.num_patches, 3 * self.patch_size**2), np.uint8
        try:
            if isinstance(self.content, StoredArray):
                patches = self.content.read(*array)
            elif cache is not None and isinstance(self.content, bytes):
                settings = "image", self.max_soft_tokens, self.patch_size, self.pooling_size
                patches = cache.get(self.content, self._decode, *array, settings=settings, libraries=("pillow",))
            else:
                patches = self._decode()
        except InputError as error:
            raise InputError(f"{self.name}: {error}" if self.name else str(error)) from error
        grid = self.height // self.pooling_size, self.width // self.pooling_size
        return ImagePatches(patches, patch_positions(*grid, self.pooling_size), self.num_soft_tokens)

    def _decode(self) -> np.ndarray:
        assert not isinstance(self.content, StoredArray)
        cells = {"patch_size": self.patch_size, "pooling_size": self.pooling_size}
        image = read_patches(self.content, max_soft_tokens=self.max_soft_tokens, **cells)
        if image.positions.max(axis=0).tolist() != [self.width - 1, self.height - 1]:
            raise InputError("an image is damaged: its header tells another size than its pixels have.")
        return image.patches


@dataclasses.dataclass(frozen=True)
class SizedSound:
    """A sound of which the length is known, and the samples are still in its file.

    Attributes:
      content: what `sounds.read_samples` reads, or where its features are.
      num_frames: of its features.
      mel_bins: numbers in a frame.
      seconds: the stretch of it that is meant, (first, behind the last); None for all.
      name: of its file, for messages; empty if it has none.
    """

    content: np.ndarray | bytes | StoredArray
    num_frames: int
    mel_bins: int
    seconds: tuple[int, int] | None = None
    name: str = ""

    @classmethod
    def of(
        cls,
        content: np.ndarray | bytes,
        *,
        mel_bins: int,
        seconds: tuple[int, int] | None = None,
        name: str = "",
    ) -> "SizedSound":
        """The sound with its length, which the header of its file tells.

        Raises:
          InputError: it cannot be read, as far as that shows.
        """
        return cls(content, num_frames(num_samples(content, seconds)), mel_bins, seconds, name)

    @property
    def num_soft_tokens(self) -> int:
        """That the tower makes of its frames."""
        return num_soft_tokens(self.num_frames)

    @property
    def num_bytes(self) -> int:
        """Of memory, while it waits to be read; the pieces of a sound share what its first has."""
        if self.seconds is not None and self.seconds[0] > 0:
            return 0
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes

    def read(self, cache: Cache | None = None) -> np.ndarray:
        """Its [F, M] log-mel features.

        Args:
          cache: as in `SizedImage.read`.
        Raises:
          InputError: it cannot be decoded, or its header told another length.
        """
        array = (self.num_frames, self.mel_bins), np.float32
        try:
            if isinstance(self.content, StoredArray):
                return self.content.read(*array)
            if cache is not None and isinstance(self.content, bytes):
                settings, libraries = ("sound", self.seconds), ("soundfile", "scipy", "numpy")
                return cache.get(self.content, self._decode, *array, settings=settings, libraries=libraries)
            return self._decode()
        except InputError as error:
            raise InputError(f"{self.name}: {error}" if self.name else str(error)) from error

    def _decode(self) -> np.ndarray:
        assert not isinstance(self.content, StoredArray)
        features = log_mel(read_samples(self.content, self.seconds), self.mel_bins)
        if len(features) != self.num_frames:
            raise InputError("a sound is damaged: its header tells another length than it has.")
        return features


@dataclasses.dataclass(frozen=True)
class SizedExample:
    """An example whose images and sounds are still to be read: rows are packed by their sizes.

    Attributes:
      text: the example without them, in which their soft tokens have their places.
      images: in the order of these places.
      image_token: id of the placeholder of images.
      sounds: as `images`.
    """

    text: Example
    images: tuple[SizedImage, ...] = ()
    image_token: int = -1
    sounds: tuple[SizedSound, ...] = ()

    @property
    def media(self) -> tuple[SizedImage | SizedSound, ...]:
        """Its images, then its sounds."""
        return *self.images, *self.sounds

    @property
    def num_bytes(self) -> int:
        """Of memory, while it waits to be read; that of its tokens does not count."""
        return sum(medium.num_bytes for medium in self.media)

    def read(self, cache: Cache | None = None) -> Example:
        """The example with its images and sounds; images that may be missing, and cannot be read, are left out of it.

        Args:
          cache: as in `SizedImage.read`.
        Raises:
          InputError: another cannot be read; the sentence names the document.
        """
        example, images = self.text, []
        for image in self.images:
            try:
                images.append(image.read(cache))
            except InputError as error:
                if not image.may_be_missing:
                    raise InputError(f"{example.name}: {error}") from error
                first = sum(found.num_soft_tokens for found in images)
                example = self._without(example, first, image.num_soft_tokens)
        try:
            sounds = tuple(sound.read(cache) for sound in self.sounds)
        except InputError as error:
            raise InputError(f"{example.name}: {error}") from error
        return dataclasses.replace(example, images=tuple(images), sounds=sounds)

    def _without(self, example: Example, first: int, number: int) -> Example:
        """The example without so many soft tokens, from the first of them on, and the marks around them."""
        places = np.flatnonzero(example.tokens == self.image_token)[first : first + number]
        cut = np.r_[places[0] - 1 : places[-1] + 2]
        return dataclasses.replace(
            example,
            tokens=np.delete(example.tokens, cut),
            carries_loss=np.delete(example.carries_loss, cut),
            images_missing=example.images_missing + 1,
        )


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands where a record could not be read, so that it is counted and named rather than lost.

    Attributes:
      reason: one sentence that names the record.
      source: as in `Example`.
    """

    reason: str
    source: str = ""
