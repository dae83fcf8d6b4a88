"""Handwritten numbers to read: canvases composed from real scans of single digits.

The scans are 8 x 8 pixels (bundled/ATTRIBUTION.txt). A canvas keeps their resolution; the resize that every image
goes through enlarges it. That resize fills the soft-token budget whatever the canvas, so all canvases have about the
same area and digits about the same size, three soft tokens, and only the shape varies with the number of digits.
"""

import functools
from importlib import resources

import numpy as np
import PIL.Image

from gemma4_jax.data.document import Document, Image, Text

SCAN = 8
"""Side of a scan in pixels."""

MAX_DIGITS = 6
MAX_IMAGES = 4
QUESTIONS = ("read: ", "number? ", "digits = ")

# Width and height of a canvas in scan pixels, by its number of digits.
_CANVAS = {1: (17, 25), 2: (21, 21), 3: (24, 18), 4: (32, 14), 5: (40, 11), 6: (48, 9)}
_VARIANTS = 16

# Shares of training images by their number of digits, and of training documents by their number of images. Short
# numbers alone come often: where to look is learned on them first.
_DIGITS_SHARES = 1 / np.arange(1, MAX_DIGITS + 1) / np.sum(1 / np.arange(1, MAX_DIGITS + 1))
_IMAGES_SHARES = np.array([0.97, 0.01, 0.01, 0.01])


def load_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(scans [N, 8, 8] float32 in 0..1, labels [N] uint8) of one side of the split stored in digits.npz."""
    with resources.files("gemma4_jax.data").joinpath("bundled/digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        chosen = arrays["held_out"] == (split == "held_out")
        return arrays["scans"][chosen].astype(np.float32) / 16, arrays["labels"][chosen]


@functools.cache
def _training_variants() -> tuple[np.ndarray, np.ndarray]:
    """(scans, labels) of training, with variants of each scan: a little turned, scaled, slanted and shifted."""
    scans, labels = load_scans("train")
    rng = np.random.default_rng(0)
    variants = [scans]
    for _ in range(_VARIANTS - 1):
        turn, slant = rng.uniform(-0.15, 0.15, (2, len(scans)))
        scale = rng.uniform(0.9, 1.1, (2, len(scans)))
        shift = rng.uniform(-0.4, 0.4, (2, len(scans))) + (SCAN - 1) / 2
        # Output pixel (x, y) reads the input at matrix @ (x - c, y - c) + c + shift.
        matrix = np.stack([scale[0], slant - turn, turn, scale[1]])
        offset = shift - (SCAN - 1) / 2 * np.stack([matrix[0] + matrix[1], matrix[2] + matrix[3]])
        coefficients = np.stack([matrix[0], matrix[1], offset[0], matrix[2], matrix[3], offset[1]], axis=1)
        variants.append(np.stack([_warp(scan, row) for scan, row in zip(scans, coefficients, strict=True)]))
    return np.concatenate(variants).clip(0, 1), np.tile(labels, _VARIANTS)


def _warp(scan: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    image = PIL.Image.fromarray(scan)
    affine, bicubic = PIL.Image.Transform.AFFINE, PIL.Image.Resampling.BICUBIC
    return np.asarray(image.transform((SCAN, SCAN), affine, tuple(coefficients), bicubic))


def compose(rng: np.random.Generator, scans: np.ndarray) -> np.ndarray:
    """Draws scans side by side from the upper left corner, in light ink on a dark canvas.

    Args:
      rng: decides the colours.
      scans: [n, 8, 8] float32 in 0..1, n from 1 to MAX_DIGITS.
    Returns:
      uint8 [height, width, 3].
    """
    width, height = _CANVAS[len(scans)]
    canvas = np.zeros((height, width, 1), np.float32)
    canvas[:SCAN, : SCAN * len(scans), 0] = np.concatenate(scans, axis=1)
    paper, ink = rng.uniform(0, 50, 3), rng.uniform(180, 255, 3)
    return (paper + (ink - paper) * canvas).astype(np.uint8)


class DigitsSource:
    """Documents that show numbers and ask to read them.

    A training document holds one to four images of one to six digits; a held-out one a single image, made of scans
    that no training document shows, with every number of digits as likely as another. Document i depends on nothing
    but the split, the seed and i.

    Args:
      split: "train" or "held_out".
      seed: of the documents.
    """

    def __init__(self, split: str, seed: int) -> None:
        self._is_train = split == "train"
        self._seed = seed
        self._scans, self._labels = _training_variants() if self._is_train else load_scans(split)

    def __len__(self) -> int:
        return 2**31 - 1  # without end; as many as a shuffle of 32 bits can address

    def __getitem__(self, index: int) -> Document:
        rng = np.random.default_rng((self._is_train, self._seed, index))
        segments: list[Text | Image] = []
        for _ in range(1 + rng.choice(MAX_IMAGES, p=_IMAGES_SHARES) if self._is_train else 1):
            num_digits = 1 + rng.choice(MAX_DIGITS, p=_DIGITS_SHARES if self._is_train else None)
            chosen = rng.integers(len(self._labels), size=num_digits)
            answer = "".join(map(str, self._labels[chosen])) + "\n"
            question = QUESTIONS[rng.integers(len(QUESTIONS))]
            segments += [Image(compose(rng, self._scans[chosen])), Text(question, loss=False), Text(answer)]
        return Document(tuple(segments), f"digits {index}")
