"""Encoded documents: before their images are read, when only the sizes of these are known, and after."""

import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image

from gemma4_jax.data.image_sizes import upright_size
from gemma4_jax.data.images import ImagePatches, patch_positions, read_patches
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
class StoredPatches:
    """The patches of an image in a file that was prepared, one after another as `images.cut_patches` cuts them.

    Attributes:
      path: of the file.
      offset: of its first byte in that.
      nbytes: that the image had before it was prepared. While it waits it counts as much, so that a row chooses among
        the same documents.
      damage: why it could not be read when it was prepared; empty if it could.
    """

    path: Path
    offset: int
    nbytes: int
    damage: str = ""

    def read(self, num_patches: int, patch_dim: int) -> np.ndarray:
        """[num_patches, patch_dim] uint8.

        Raises:
          InputError: they cannot be read, or never could.
        """
        if self.damage:
            raise InputError(self.damage)
        patches = np.empty((num_patches, patch_dim), np.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                num_bytes = file.readinto(patches.data)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}.") from error
        if num_bytes != patches.nbytes:
            raise InputError(f"{self.path} is damaged: it ends within an image.")
        return patches


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

    content: np.ndarray | PIL.Image.Image | bytes | StoredPatches
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

    def read(self) -> ImagePatches:
        """Its patches.

        Raises:
          InputError: it cannot be decoded, or its header told another size.
        """
        cells = {"patch_size": self.patch_size, "pooling_size": self.pooling_size}
        try:
            if isinstance(self.content, StoredPatches):
                patches = self.content.read(self.num_patches, 3 * self.patch_size**2)
                grid = self.height // self.pooling_size, self.width // self.pooling_size
                positions = patch_positions(*grid, self.pooling_size)
                return ImagePatches(patches, positions, self.num_soft_tokens)
            image = read_patches(self.content, max_soft_tokens=self.max_soft_tokens, **cells)
            if image.positions.max(axis=0).tolist() != [self.width - 1, self.height - 1]:
                raise InputError("an image is damaged: its header tells another size than its pixels have.")
            return image
        except InputError as error:
            raise InputError(f"{self.name}: {error}" if self.name else str(error)) from error


@dataclasses.dataclass(frozen=True)
class SizedExample:
    """An example whose images are still to be read: rows are packed by their sizes.

    Attributes:
      text: the example without its images, in which their soft tokens have their places.
      images: in the order of these places.
      image_token: id of the placeholder.
    """

    text: Example
    images: tuple[SizedImage, ...] = ()
    image_token: int = -1

    @property
    def num_bytes(self) -> int:
        """Of memory, while it waits to be read; that of its tokens does not count."""
        return sum(image.num_bytes for image in self.images) + sum(sound.nbytes for sound in self.text.sounds)

    def read(self) -> Example:
        """The example with its images; those that may be missing, and cannot be read, are left out of it.

        Raises:
          InputError: another image cannot be read; the sentence names the document.
        """
        example, images = self.text, []
        for image in self.images:
            try:
                images.append(image.read())
            except InputError as error:
                if not image.may_be_missing:
                    raise InputError(f"{example.name}: {error}") from error
                first = sum(found.num_soft_tokens for found in images)
                example = self._without(example, first, image.num_soft_tokens)
        return dataclasses.replace(example, images=tuple(images))

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
