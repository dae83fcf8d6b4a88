"""Sounds in the documents of samples.py, in numpy."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from gemma4_jax.audio.features import log_mel, num_soft_tokens
from gemma4_jax.batch import Batch
from gemma4_jax.config import Gemma4Config


def make(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A whistle that rises, and noise: [n] float32."""
    seconds = np.arange(num_samples) / 16_000
    whistle = np.sin(2 * np.pi * rng.uniform(200, 2000) * seconds * (1 + seconds))
    return (0.3 * whistle + 0.05 * rng.standard_normal(num_samples)).astype(np.float32)


def is_sound(segment: Any) -> TypeGuard[np.ndarray]:
    """Whether a segment of a document is a sound."""
    return isinstance(segment, np.ndarray) and segment.ndim == 1


def tokens(segment: np.ndarray, config: Gemma4Config) -> list[int]:
    """What stands for a sound in a document."""
    roles = config.tokens
    return [roles.begin_audio, *[roles.audio] * num_soft_tokens(len(_features(segment, config))), roles.end_audio]


def arrays(documents: Sequence[Sequence[Any]], config: Gemma4Config) -> tuple[np.ndarray, np.ndarray]:
    """Every sound of some documents: ([A, F, M] features, padded with zeros, [A] frames of each)."""
    assert config.audio is not None
    heard = [_features(segment, config) for document in documents for segment in document if is_sound(segment)]
    lengths = np.array([len(features) for features in heard], np.int32)
    padded = np.zeros((len(heard), max(lengths, default=0), config.audio.num_mel_bins), np.float32)
    for place, features in zip(padded, heard, strict=True):
        place[: len(features)] = features
    return padded, lengths


def add(batch: Batch, rows: Sequence[Sequence[Sequence[Any]]], config: Gemma4Config) -> Batch:
    """The batch of some rows of documents, with their sounds; without any it stays as it is."""
    heard = [arrays(row, config) for row in rows]
    longest = max(features.shape[1] for features, _ in heard)
    if longest == 0:
        return batch
    shape = (len(rows), max(len(lengths) for _, lengths in heard))
    features = np.zeros((*shape, longest, heard[0][0].shape[2]), np.float32)
    lengths, slots = np.zeros(shape, np.int32), np.full(np.shape(batch.tokens), -1, np.int32)
    for b, (row_features, row_lengths) in enumerate(heard):
        features[b, : len(row_features), : row_features.shape[1]] = row_features
        lengths[b, : len(row_lengths)] = row_lengths
        starts = np.arange(len(row_lengths)) * num_soft_tokens(longest)
        places = [start + np.arange(num_soft_tokens(length)) for start, length in zip(starts, row_lengths, strict=True)]
        slots[b, np.asarray(batch.tokens)[b] == config.tokens.audio] = np.concatenate([np.zeros(0, int), *places])
    return dataclasses.replace(batch, audio_features=features, audio_lengths=lengths, audio_slots=slots)


def _features(segment: np.ndarray, config: Gemma4Config) -> np.ndarray:
    assert config.audio is not None
    return log_mel(segment, config.audio.num_mel_bins)
