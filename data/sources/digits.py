"""Handwritten numbers to read: canvases composed from real scans of single digits.

The scans are 8 x 8 pixels (bundled/ATTRIBUTION.txt). A canvas keeps their resolution; the resize that every image
goes through enlarges it. That resize fills the soft-token budget whatever the canvas, so all canvases have about the
same area for about the same size of digit, and only their shape varies with the number of digits.
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

_CANVAS_AREA = (9.5 * SCAN**2, 12.5 * SCAN**2)
_ASPECT_RATIO = (0.6, 3.0)
_VARIANTS = 16


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
    """Draws scans side by side, with jitter, in light ink on a dark canvas of varying shape.

    Args:
      rng: decides shape, places and colours.
      scans: [n, 8, 8] float32 in 0..1.
    Returns:
      uint8 [height, width, 3].
    """
    gaps = rng.integers(0, 3, len(scans))
    span = SCAN * len(scans) + int(gaps[:-1].sum())
    area = rng.uniform(*_CANVAS_AREA)
    narrowest = max(span + 2, np.sqrt(area * _ASPECT_RATIO[0]))
    widest = max(narrowest, min(area / (SCAN + 2), np.sqrt(area * _ASPECT_RATIO[1])))
    width = int(rng.uniform(narrowest, widest))
    height = max(SCAN + 2, round(area / width))
    canvas = np.zeros((height, width), np.float32)
    x, top = rng.integers(width - span + 1), rng.integers(height - SCAN + 1)
    jitter = np.clip(top + rng.integers(-1, 2, len(scans)), 0, height - SCAN)
    for scan, gap, y in zip(scans, gaps, jitter, strict=True):
        canvas[y : y + SCAN, x : x + SCAN] = scan
        x += SCAN + gap
    paper, ink = rng.uniform(0, 50, 3), rng.uniform(180, 255, 3)
    return (paper + (ink - paper) * canvas[..., None]).astype(np.uint8)


class DigitsSource:
    """Documents that show numbers and ask to read them.

    A training document holds one to four images of one to six digits; a held-out one a single image, made of scans
    that no training document shows. Document i depends on nothing but the split, the seed and i.

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
        for _ in range(rng.integers(1, MAX_IMAGES + 1) if self._is_train else 1):
            chosen = rng.integers(len(self._labels), size=rng.integers(1, MAX_DIGITS + 1))
            answer = "".join(map(str, self._labels[chosen])) + "\n"
            question = QUESTIONS[rng.integers(len(QUESTIONS))]
            segments += [Image(compose(rng, self._scans[chosen])), Text(question, loss=False), Text(answer)]
        return Document(tuple(segments), f"digits {index}")
