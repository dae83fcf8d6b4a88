"""Image bytes or pixels to patches, as the vision tower reads them, and back to pixels for people."""

import base64
import dataclasses
import functools
import html
import io
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.features
import PIL.Image
import PIL.ImageOps

from gemma4_jax.errors import InputError
from gemma4_jax.vision.geometry import resized_size

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
"""Image files that are read; MPO, the JPEG of several pictures that phones write, is a JPEG. Pillow knows more, some of
which run other programs."""

MAX_PIXELS = 2**26
"""An image of more pixels than this is refused before it is decoded."""

MAX_EXACT_PIXELS, MAX_SHOWN_SIDE = 2**15, 448
"""Of an image on a page."""


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

    @property
    def num_patches(self) -> int:
        """n."""
        return len(self.patches)


def read_patches(
    image: np.ndarray | PIL.Image.Image | bytes, *, patch_size: int, pooling_size: int, max_soft_tokens: int
) -> ImagePatches:
    """The patches of an image as a person sees it (`read_pixels`), resized as `geometry.resized_size` says.

    The same as `cut_patches` of `resize_image` of `read_pixels`, without copies of the whole image in between.

    Args:
      image: as `read_pixels` takes it.
      patch_size, pooling_size: of the vision tower; pixels, and patches along a side of a cell.
      max_soft_tokens: budget of the image.
    Raises:
      InputError: as `read_pixels`, or its sides are too unlike for the budget.
    """
    picture = _read(image)
    cells = {"patch_size": patch_size, "pooling_size": pooling_size}
    height, width = resized_size(picture.height, picture.width, max_soft_tokens=max_soft_tokens, **cells)
    if picture.size != (width, height):
        picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return cut_patches(np.asarray(picture), **cells)


def read_pixels(image: np.ndarray | PIL.Image.Image | bytes) -> np.ndarray:
    """The pixels of an image as a person sees it on white paper: upright, in colours, nothing of it transparent.

    A file, the Pillow image that it opens as, and the array of its pixels give the same. Of several pictures in a file
    the first is read; docs/images.md lists what becomes of each kind.

    Args:
      image: not yet trusted. The bytes of a file in one of `FORMATS`; a Pillow image; or an array: bool or uint16
        [height, width], or uint8 [height, width] or [height, width, C] with C channels: gray, gray and alpha, RGB, or
        RGBA.
    Returns:
      [height, width, 3] uint8.
    Raises:
      InputError: it cannot be decoded, has more than `MAX_PIXELS` pixels, or its pixels are in no known range.
    Source: `convert_to_rgb` of transformers 5.23, but for pixels of 16 bits and more, which it clips.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
        return image
    return np.asarray(_read(image))


def _read(image: np.ndarray | PIL.Image.Image | bytes) -> PIL.Image.Image:
    """An image as `read_pixels` has it, in mode RGB."""
    if isinstance(image, np.ndarray):
        return _rgb(_picture(image))
    try:
        if isinstance(image, bytes):
            with PIL.Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                return _rgb(opened)
        return _rgb(image)
    except InputError:
        raise
    except Exception as error:  # decoders meet hostile bytes with exceptions of every kind
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, PIL.UnidentifiedImageError):  # it names an object in memory
            reason = "it is damaged or of another format"
        raise InputError(
            f"an image cannot be decoded ({reason}): give a whole file of {_accepted_formats()}."
        ) from error


def _accepted_formats() -> str:
    lacking = [name for name in ("WEBP", "AVIF") if not PIL.features.check(name.lower())]
    accepted = ", ".join(name for name in FORMATS if name not in lacking)
    return (
        f"{accepted}; for {' and '.join(lacking)} install a wheel of Pillow, as this build has none"
        if lacking
        else accepted
    )


def _picture(pixels: np.ndarray) -> PIL.Image.Image:
    """An array as Pillow's image of the same pixels."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    is_known = pixels.dtype == np.uint8 if pixels.ndim == 3 else pixels.dtype in (np.uint8, np.uint16, np.bool_)
    if pixels.ndim not in (2, 3) or not 1 <= channels <= 4 or not is_known or not pixels.size:
        raise InputError(
            f"an image cannot be {pixels.dtype} {list(pixels.shape)}: give uint8 pixels [height, width, 3], "
            "[height, width] for gray, or with alpha as the last of 2 or 4 channels."
        )
    return PIL.Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels)


def _rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise InputError(f"an image of {height} x {width} pixels is refused: at most {MAX_PIXELS} are read.")
    if picture.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if picture.mode == "I" else "floats"
        raise InputError(f"an image of {kind} is refused, as nothing says what is white: store it with 8 or 16 bits.")
    picture.load()  # only then all of its EXIF is there
    if picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:  # else it would be copied
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        gray = np.asarray(picture)
        # The high byte, as Pillow does with 16 bits of each colour: so gray is the same in every form.
        levels = (gray >> 8).astype(np.uint8)
        levels[gray == picture.info.get("transparency", -1)] = 255
        return PIL.Image.fromarray(levels).convert("RGB")
    if picture.has_transparency_data:
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


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
    return ImagePatches(grid.reshape(-1, 3 * p * p), patch_positions(rows, columns, k), rows * columns)


@functools.lru_cache(maxsize=256)
def patch_positions(rows: int, columns: int, pooling_size: int) -> np.ndarray:
    """[n, 2] int32, the (x, y) of the patches of an image of so many cells, ordered cell by cell; not to be written."""
    k = pooling_size
    y, x = np.indices((rows * k, columns * k), dtype=np.int32)
    positions = np.stack([x, y], axis=-1).reshape(rows, k, columns, k, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    positions.setflags(write=False)
    return positions


def join_patches(patches: np.ndarray, positions: np.ndarray, *, patch_size: int) -> np.ndarray:
    """The image that `cut_patches` cut, uint8 [height, width, 3]; the patches may come in any order."""
    columns, rows = positions.max(axis=0) + 1
    grid = np.zeros((rows, columns, patch_size, patch_size, 3), np.uint8)
    grid[positions[:, 1], positions[:, 0]] = patches.reshape(-1, patch_size, patch_size, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * patch_size, columns * patch_size, 3)


def image_element(pixels: np.ndarray, label: str) -> str:
    """uint8 [height, width, 3] pixels as an <img> element.

    A small image is shown pixel for pixel, enlarged as far as a page has room; one of more than `MAX_EXACT_PIXELS` as a
    JPEG of at most `MAX_SHOWN_SIDE` pixels a side, so that a page of a thousand can still be opened.
    """
    height, width = pixels.shape[:2]
    picture = PIL.Image.fromarray(pixels)
    if height * width > MAX_EXACT_PIXELS:
        picture.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
        source, (width, height), style = picture_source(picture, "JPEG", quality=80), picture.size, ""
    else:
        scale = max(1, min(round(72 / min(height, width)), 900 // width, MAX_SHOWN_SIDE // height))
        source, style = picture_source(picture), ' style="image-rendering: pixelated"'
        width, height = width * scale, height * scale
    return f'<img src="{source}" width="{width}" height="{height}"{style} alt="{html.escape(label)}">'


def picture_source(picture: PIL.Image.Image, kind: str = "PNG", **options: Any) -> str:
    """A picture as the `src` of an <img> element; `options` are those of Pillow's writer of this kind."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
