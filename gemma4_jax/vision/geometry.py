"""From the size of an image and a budget of soft tokens to the grid of patches it is cut into.

Pure Python: importing this module imports neither jax nor numpy.
Source: docs/gemma4.md section 3, "Image to patches".
"""

import math

from gemma4_jax.errors import InputError

SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)
"""Soft tokens an image may be given at most; the released models know these five."""


def resized_size(
    height: int, width: int, *, patch_size: int, pooling_size: int, max_soft_tokens: int
) -> tuple[int, int]:
    """The size an image is resized to: whole cells, nearly the same shape, as large as the budget allows.

    A cell is pooling_size x pooling_size patches and becomes one soft token. Small images are enlarged.

    Args:
      height, width: of the image, in pixels.
      patch_size: side of a patch, in pixels.
      pooling_size: side of a cell, in patches.
      max_soft_tokens: budget of the image.
    Returns:
      (height, width) in pixels, both multiples of patch_size * pooling_size.
    Raises:
      InputError: if the image has no pixels, or no size within the budget exists for its shape.
    Source: docs/gemma4.md section 3; the same rounding as the reference, in the same order of float64 operations.
    """
    if height < 1 or width < 1:
        raise InputError(f"An image of {height} x {width} pixels has no content: both sides must be at least 1.")
    cell = patch_size * pooling_size
    budget_pixels = max_soft_tokens * cell**2
    scale = math.sqrt(budget_pixels / (height * width))
    rows, columns = math.floor(scale * height / cell), math.floor(scale * width / cell)
    # A long thin image may round down to no cell at all across: it gets one, and its length is bounded instead.
    if rows == 0 and columns > 0:
        rows, columns = 1, min(width // height, max_soft_tokens)
    elif columns == 0 and rows > 0:
        rows, columns = min(height // width, max_soft_tokens), 1
    if not 0 < rows * columns <= max_soft_tokens:
        raise InputError(
            f"An image of {height} x {width} pixels has no size of 1 to {max_soft_tokens} cells of {cell} x {cell} "
            "pixels: choose a larger budget of soft tokens."
        )
    return rows * cell, columns * cell


def patch_grid(height: int, width: int, *, patch_size: int, pooling_size: int, max_soft_tokens: int) -> tuple[int, int]:
    """(rows, columns) of patches of an image after `resized_size`; arguments and errors are the same."""
    resized = resized_size(
        height, width, patch_size=patch_size, pooling_size=pooling_size, max_soft_tokens=max_soft_tokens
    )
    return resized[0] // patch_size, resized[1] // patch_size


def num_soft_tokens(height: int, width: int, *, patch_size: int, pooling_size: int, max_soft_tokens: int) -> int:
    """Soft tokens that an image becomes; arguments and errors as in `resized_size`."""
    rows, columns = patch_grid(
        height, width, patch_size=patch_size, pooling_size=pooling_size, max_soft_tokens=max_soft_tokens
    )
    return rows * columns // pooling_size**2
