"""Writes digits.npz, the handwritten digits shipped in this package, from the copy that scikit-learn bundles.

    pip install scikit-learn
    python data/bundled/make_digits.py

Every fourth scan of each digit, in a shuffled order that is fixed here, is held out. The split is stored beside the
scans, so that all users of the file agree on it.
"""

from pathlib import Path

import numpy as np


def held_out_scans(labels: np.ndarray) -> np.ndarray:
    """[N] bool: a quarter of the scans of each digit, the same ones on every call."""
    held_out = np.zeros(len(labels), bool)
    order = np.random.default_rng(0).permutation(len(labels))
    for digit in range(10):
        held_out[order[labels[order] == digit][3::4]] = True
    return held_out


def main() -> None:
    """Writes the file."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.uint8)
    np.savez_compressed(
        Path(__file__).with_name("digits.npz"),
        scans=digits.images.astype(np.uint8), labels=labels, held_out=held_out_scans(labels),
    )  # fmt: skip


if __name__ == "__main__":
    main()
