"""The first records of a run's sources, counted: what they take of a row, what carries loss, what is left out."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from gemma4_jax.audio.features import HOP, SAMPLE_RATE
from gemma4_jax.data.chat_templates import chat_template
from gemma4_jax.data.document import Document, Pair
from gemma4_jax.data.documents import Documents, open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.example import SizedExample
from gemma4_jax.data.pack import RowShape, Size, choose, fit, size_of
from gemma4_jax.data.packer import LOOKAHEAD
from gemma4_jax.data.pairs import encode_pair
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import DataConfig, RunConfig
from gemma4_jax.tokenizer import Tokenizer

SAMPLE_RECORDS = 1000
"""Records that are read, shared out among the sources."""

SAMPLE_SECONDS = 60.0
"""That are spent on it, shared out likewise."""

SHOWN_RECORDS = 3
"""Of each source, and as many that are left out."""

FRAMES_PER_SECOND = SAMPLE_RATE // HOP
"""Of the features of a sound."""

SLACKS = (1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0)
"""Patches that a row may have room for, over those that its tokens bring on average."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A document to be looked at.

    Attributes:
      title: where it is from, and what it is of a pair.
      document: before it was encoded.
      example: after it.
      note: why it is left out; empty if it is packed.
    """

    title: str
    document: Document
    example: SizedExample
    note: str = ""


@dataclasses.dataclass
class SourceSample:
    """What was seen of a source; of records that no row holds too.

    Attributes:
      name: of the source.
      num_records: that it has, on this side of its split.
      num_read: that were read.
      num_pairs: that are pairs, each of which counts as two documents.
      tokens, learned: of each document, how many, and how many of them carry loss.
      soft_tokens: of each image.
      images_missing: that documents go on without.
      sounds: seconds of each.
      sizes: of each document that is packed, those of its pieces.
      left_out: one sentence for each document that is left out.
      shown: the first of them.
    """

    name: str
    num_records: int
    num_read: int = 0
    num_pairs: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    learned: list[int] = dataclasses.field(default_factory=list)
    soft_tokens: list[int] = dataclasses.field(default_factory=list)
    images_missing: int = 0
    sounds: list[float] = dataclasses.field(default_factory=list)
    sizes: list[list[Size]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    shown: list[Shown] = dataclasses.field(default_factory=list)


def take_sample(config: RunConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> list[SourceSample]:
    """Reads the first records of every source that is drawn from; of images no more than their headers.

    Args:
      config: of the run, resolved.
      tokenizer: of it.
      say: is told now and then how far it is.
    Raises:
      InputError: the config is not possible, or a source cannot be opened.
    """
    shape, data = RowShape.from_config(config.data, config.model), config.data
    chat_template(tokenizer)  # so that one that cannot be read is no fault of the records
    encode = Encoder(tokenizer, config.model.vision, data.soft_tokens_per_image, config.model.audio)
    found = []
    for source in data.mixture.values():
        documents = open_documents(source, seed=data.seed, takes_pairs=True)
        sample = SourceSample(source.name, len(documents))
        found.append(sample)
        number = min(len(documents), -(-SAMPLE_RECORDS // len(data.mixture)))
        started = told = time.monotonic()
        for i in range(number):
            _read(documents, i, sample, encode, shape, data.long_masked)
            now = time.monotonic()
            if now - told > 2:
                say(f"read {i + 1:,} of {number:,} records of {source.name!r}")
                told = now
            if now - started > SAMPLE_SECONDS / len(data.mixture):
                say(f"goes on after {i + 1:,} of {number:,} records of {source.name!r}, which take long to read")
                break
    return found


def _read(
    documents: Documents, index: int, sample: SourceSample, encode: Encoder, shape: RowShape, long_masked: str
) -> None:
    """Adds one record to the sample."""
    sample.num_read += 1
    try:
        given = documents.read(index)
        if isinstance(given, Pair):
            sample.num_pairs += 1
            sides = list(
                zip(("chosen", "rejected"), (given.chosen, given.rejected), encode_pair(given, encode), strict=True)
            )
        else:
            sides = [("", given, encode(given))]
    except InputError as error:
        sample.left_out.append(str(error))
        return
    for side, document, example in sides:
        text = example.text
        sample.tokens.append(len(text.tokens))
        sample.learned.append(int(np.count_nonzero(text.carries_loss[1:])))
        sample.soft_tokens += [image.num_soft_tokens for image in example.images]
        sample.images_missing += text.images_missing
        sample.sounds += [sound.num_frames / FRAMES_PER_SECOND for sound in example.sounds]
        fitted = fit(example, shape, long_masked=long_masked)
        if fitted.pieces and not side:
            sample.sizes.append([size_of(piece) for piece in fitted.pieces])
        if not fitted.pieces:
            sample.left_out.append(fitted.reason)
        same_fate = sum(bool(shown.note) == (not fitted.pieces) for shown in sample.shown)
        if same_fate < SHOWN_RECORDS * (2 if side else 1):
            title = f"{document.name}, {side}" if side else document.name
            sample.shown.append(Shown(title, document, example, "" if fitted.pieces else fitted.reason))


def mixed_sizes(samples: Sequence[SourceSample], data: DataConfig) -> list[Size]:
    """Sizes of a thousand documents of a sample in the proportions of their sources, in a random order."""
    usable = [sample for sample in samples if sample.sizes]
    total = sum(data.mixture[sample.name].weight for sample in usable)
    drawn = []
    for sample in usable:
        number = math.ceil(SAMPLE_RECORDS * data.mixture[sample.name].weight / total)
        drawn += list(itertools.islice(itertools.cycle(sample.sizes), number))
    order = np.random.default_rng(0).permutation(len(drawn))
    return [size for i in order for size in drawn[i]]


def pack_sizes(sizes: list[Size], space: Size) -> np.ndarray:
    """What rows of these documents are full to, as the packer chooses them.

    Args:
      sizes: of documents that each fit in a row, in order.
      space: of an empty row.
    Returns:
      [rows, 2] shares of tokens and patches. The last row, which nothing is left for, is not among them if there are
      others.
    """
    waiting, rows = list(sizes), []
    while waiting:
        window = np.array(waiting[:LOOKAHEAD])
        chosen = choose(window, np.array(space))
        tokens, _, patches, _ = window[chosen].sum(axis=0)
        rows.append((tokens / space[0], patches / space[2] if space[2] else 0.0))
        for i in sorted(chosen, reverse=True):
            del waiting[i]
    return np.array(rows[:-1] or rows).reshape(-1, 2)


def suggest_patches(sizes: list[Size], shape: RowShape, largest_image: int, cell: int) -> int:
    """The fewest patches with which rows are as full of tokens as with many, but for a hundredth.

    Args:
      sizes: of documents.
      shape: of the row as it is.
      largest_image: patches of an image that uses up its budget.
      cell: patches of a soft token.
    Returns:
      A multiple of `cell`, at least `largest_image`; 0 where there are no images.
    """
    tokens, _, patches, _ = np.sum(sizes, axis=0) if sizes else (0, 0, 0, 0)
    if not patches:
        return 0
    most = shape.images * largest_image
    mean = patches / tokens * shape.tokens
    given = [math.ceil(slack * mean / cell) * cell for slack in SLACKS]
    needed = max(largest_image, *(size[2] for size in sizes))  # so that no document is too large for it
    candidates = sorted({min(most, max(needed, number)) for number in given} | {most})

    def full(number: int) -> float:
        return pack_sizes(sizes, (shape.tokens, shape.images, number, shape.frames))[:, 0].mean()

    enough = 0.99 * full(most)
    return next(number for number in candidates if full(number) >= enough)
