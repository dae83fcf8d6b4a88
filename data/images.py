"""Image bytes or pixels to patches, as the vision tower reads them, and back to pixels for people."""

import base64
import dataclasses
import html
import io
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from gemma4_jax.errors import InputError
from gemma4_jax.vision.geometry import resized_size

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Image files that are read. Pillow knows more, some of which run other programs."""

MAX_PIXELS = 2**26
"""A file that claims more pixels than this is refused before it is decoded."""


@dataclasses.dataclass(frozen=True)
class ImagePatches:
    """The patches of one image, cell by cell: those that pool into one soft token are neighbours.

    Attributes:
      patches: [n, 3 * patch_size**2] uint8, each flattened (row, column, channel).
      positions: [n, 2] int32, (x, y) of each in patches.
      num_soft_tokens: cells.
    """

    patches: np.ndarray
    positions: np.ndarray
    num_soft_tokens: int


def decode_image(data: bytes) -> np.ndarray:
    """The pixels of an image file, upright, uint8 [height, width, 3].

    Raises:
      InputError: if the bytes are not a whole image of one of `FORMATS`, or have more than `MAX_PIXELS` pixels.
    """
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"An image of {height} x {width} pixels is refused: at most {MAX_PIXELS} are read.")
            return np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # decoders meet hostile bytes with exceptions of every kind
        accepted = ", ".join(FORMATS)
        raise InputError(f"An image file cannot be decoded ({error}): give a whole file of {accepted}.") from error


def resize_image(pixels: np.ndarray, *, patch_size: int, pooling_size: int, max_soft_tokens: int) -> np.ndarray:
    """Resizes uint8 pixels [height, width, 3] as `geometry.resized_size` says, by Pillow's bicubic filter."""
    height, width = resized_size(
        *pixels.shape[:2], patch_size=patch_size, pooling_size=pooling_size, max_soft_tokens=max_soft_tokens
    )
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC))


def cut_patches(pixels: np.ndarray, *, patch_size: int, pooling_size: int) -> ImagePatches:
    """Cuts pixels [height, width, 3], whose sides are multiples of a cell, into patches ordered cell by cell."""
    p, k = patch_size, pooling_size
    rows, columns = pixels.shape[0] // (p * k), pixels.shape[1] // (p * k)
    grid = pixels.reshape(rows, k, p, columns, k, p, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    y, x = np.indices((rows * k, columns * k), dtype=np.int32)
    positions = np.stack([x, y], axis=-1).reshape(rows, k, columns, k, 2).transpose(0, 2, 1, 3, 4)
    return ImagePatches(grid.reshape(-1, 3 * p * p), positions.reshape(-1, 2), rows * columns)


def join_patches(patches: np.ndarray, positions: np.ndarray, *, patch_size: int) -> np.ndarray:
    """The image that `cut_patches` cut, uint8 [height, width, 3]; the patches may come in any order."""
    columns, rows = positions.max(axis=0) + 1
    grid = np.zeros((rows, columns, patch_size, patch_size, 3), np.uint8)
    grid[positions[:, 1], positions[:, 0]] = patches.reshape(-1, patch_size, patch_size, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * patch_size, columns * patch_size, 3)


def image_element(pixels: np.ndarray, label: str) -> str:
    """uint8 [height, width, 3] pixels as an <img> element, enlarged as far as a page has room."""
    height, width = pixels.shape[:2]
    scale = max(1, min(round(72 / min(height, width)), 900 // width))
    source, size = png_source(PIL.Image.fromarray(pixels)), f'width="{width * scale}" height="{height * scale}"'
    return f'<img src="{source}" {size} style="image-rendering: pixelated" alt="{html.escape(label)}">'


def png_source(picture: PIL.Image.Image, **options: Any) -> str:
    """A picture as the `src` of an <img> element; `options` are those of Pillow's PNG writer."""
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
