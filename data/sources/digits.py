"""Handwritten numbers to read: sheets of paper composed from real scans of single digits.

The scans are 8 x 8 pixels (bundled/ATTRIBUTION.txt). The resize that every image goes through fills the budget of soft
tokens whatever the image, so a small image of few digits would spread each over many tokens. A sheet has room for so
many digits that in the quickstart each is one soft token; sheets go from one long line to lines as short as the sheet
is tall. The number stands in the last line and begins `PLACES` digits before its end: from the digit to the token that
reads it is always the same distance, which a model of small means learns in minutes, and what it learns on one digit
serves all. The shape of a sheet tells nothing about its number.
"""

from importlib import resources
from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax.data.sources import Source

VERSION = 1
"""Of the documents: a change of this module that changes any of them counts it up."""

SCAN = 8
"""Side of a scan in pixels."""

PLACES = 6
"""Digits that a strip has room for; numbers have one to so many."""

MAX_IMAGES = 4
QUESTIONS = ("read: ", "number? ", "value = ")

SHEETS = (
    (1, 36, 15), (1, 37, 15), (1, 38, 14), (1, 39, 14), (1, 40, 14),
    (2, 24, 11), (3, 17, 10), (4, 14, 9), (5, 11, 9), (7, 8, 8), (8, 7, 8),
)  # fmt: skip
"""(lines, digits that a line has room for, pixels from line to line): they resize to as many cells of soft tokens.

From 320 x 14 pixels to 56 x 64: the more a size loses when it is rounded to whole cells, the fewer tokens it costs.
"""

# Shares of training documents by their number of images.
_IMAGES_SHARES = (0.7, 0.1, 0.1, 0.1)


def load_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(scans [N, 8, 8] float32 in 0..1, labels [N] uint8) of one side of the split stored in digits.npz."""
    with resources.files("gemma4_jax.data").joinpath("bundled/digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        chosen = arrays["held_out"] == (split == "held_out")
        return arrays["scans"][chosen].astype(np.float32) / 16, arrays["labels"][chosen]


def vary(rng: np.random.Generator, scan: np.ndarray) -> np.ndarray:
    """A scan [8, 8] a little turned, scaled, slanted and shifted: no two that training shows are the same."""
    turn, slant = rng.uniform(-0.15, 0.15, 2)
    matrix = np.array([[rng.uniform(0.9, 1.1), slant - turn], [turn, rng.uniform(0.9, 1.1)]])
    centre = (SCAN - 1) / 2
    # Output pixel p reads the input at matrix @ (p - centre) + centre + shift.
    offset = centre - matrix.sum(axis=1) * centre + rng.uniform(-0.4, 0.4, 2)
    affine, bicubic = PIL.Image.Transform.AFFINE, PIL.Image.Resampling.BICUBIC
    coefficients = tuple(np.column_stack([matrix, offset]).ravel())
    return np.asarray(PIL.Image.fromarray(scan).transform(scan.shape, affine, coefficients, bicubic)).clip(0, 1)


def compose(rng: np.random.Generator, scans: np.ndarray) -> np.ndarray:
    """Draws scans side by side in the last places of the last line of a sheet, in light ink on dark paper.

    Args:
      rng: decides the size and the colours.
      scans: [n, 8, 8] float32 in 0..1, n from 1 to PLACES.
    Returns:
      uint8 [height, width, 3].
    """
    lines, columns, pitch = SHEETS[rng.integers(len(SHEETS))]
    height, width = lines * pitch, columns * SCAN
    number = PIL.Image.fromarray(np.concatenate(scans, axis=1))
    stretched = np.asarray(number.resize((number.width, pitch), PIL.Image.Resampling.BICUBIC))
    first = width - SCAN * PLACES
    ink = np.zeros((height, width, 1), np.float32)
    ink[-pitch:, first : first + number.width, 0] = stretched.clip(0, 1)
    paper, pen = rng.uniform(0, 50, 3), rng.uniform(180, 255, 3)
    return (paper + (pen - paper) * ink).astype(np.uint8)


class DigitsSource(Source):
    """Records of the task `segments` that show numbers and ask to read them.

    A training document holds one to four images, made of variants of scans; a held-out one a single image, made of
    scans that no training document shows. Document i depends on nothing but the split, the seed and i.

    Args:
      split: "train" or "held_out".
      seed: of the documents.
    """

    def __init__(self, split: str, seed: int) -> None:
        self._is_train = split == "train"
        self._seed = seed
        self._scans, self._labels = load_scans(split)

    def __len__(self) -> int:
        return 2**31 - 1  # without end; as many as a shuffle of 32 bits can address

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self._is_train, self._seed, index))
        segments: list[dict[str, Any]] = []
        for _ in range(1 + rng.choice(MAX_IMAGES, p=_IMAGES_SHARES) if self._is_train else 1):
            chosen = rng.integers(len(self._labels), size=rng.integers(1, PLACES + 1))
            answer = "".join(map(str, self._labels[chosen])) + "\n"
            question = QUESTIONS[rng.integers(len(QUESTIONS))]
            scans = self._scans[chosen]
            if self._is_train:
                scans = np.stack([vary(rng, scan) for scan in scans])
            segments += [{"text": question, "loss": False}, {"image": compose(rng, scans)}, {"text": answer}]
        return {"segments": segments}

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "digits", "version": VERSION}

    def name(self, index: int) -> str:
        return f"digits {index}"
