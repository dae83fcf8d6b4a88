"""Sounds in the documents of samples.py, in numpy."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from gemma4_jax.audio.features import log_mel
from gemma4_jax.config import Gemma4Config


def make(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A whistle that rises, and noise: [n] float32."""
    seconds = np.arange(num_samples) / 16_000
    whistle = np.sin(2 * np.pi * rng.uniform(200, 2000) * seconds * (1 + seconds))
    return (0.3 * whistle + 0.05 * rng.standard_normal(num_samples)).astype(np.float32)


def is_sound(segment: Any) -> TypeGuard[np.ndarray]:
    """Whether a segment of a document is a sound."""
    return isinstance(segment, np.ndarray) and segment.ndim == 1


def features(segment: np.ndarray, config: Gemma4Config) -> np.ndarray:
    """Of a sound, as the model of this config hears it."""
    assert config.audio is not None
    return log_mel(segment, config.audio.num_mel_bins)


def arrays(documents: Sequence[Sequence[Any]], config: Gemma4Config) -> tuple[np.ndarray, np.ndarray]:
    """Every sound of some documents: ([A, F, M] features, padded with zeros, [A] frames of each)."""
    assert config.audio is not None
    heard = [features(segment, config) for document in documents for segment in document if is_sound(segment)]
    lengths = np.array([len(features) for features in heard], np.int32)
    padded = np.zeros((len(heard), max(lengths, default=0), config.audio.num_mel_bins), np.float32)
    for place, features_of_one in zip(padded, heard, strict=True):
        place[: len(features_of_one)] = features_of_one
    return padded, lengths
