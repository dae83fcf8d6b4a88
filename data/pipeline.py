"""From a run's config to batches: sources, mixture, shuffle, shards, packing, workers, prefetch."""

import functools
from collections.abc import Sequence

import grain
import numpy as np

from gemma4_jax.batch import FIELDS, Batch
from gemma4_jax.data.assemble import assemble
from gemma4_jax.data.cache import Cache, open_cache
from gemma4_jax.data.chat_templates import chat_template
from gemma4_jax.data.documents import holds_back, open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.example import Example
from gemma4_jax.data.iterator import PackedRows, TrainIterator, num_threads
from gemma4_jax.data.mixture import Examples, mix_sources, open_sources
from gemma4_jax.data.pack import RowShape, Rules
from gemma4_jax.data.packer import Packer
from gemma4_jax.data.tally import Judge
from gemma4_jax.data.workers import Prefetch, read_in_workers
from gemma4_jax.errors import InputError
from gemma4_jax.fields import require
from gemma4_jax.run_config import DataConfig, RunConfig
from gemma4_jax.tokenizer import Tokenizer

PREFETCHED_BATCHES = 2


def make_train_iterator(
    config: RunConfig, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
) -> TrainIterator:
    """The training batches of one process, endless.

    Documents are drawn from the sources in the proportions of their weights, each source in a new random order every
    epoch. Of that sequence, row r of every batch takes documents r, r + B, r + 2 B, ..., where B is data.batch_size. So
    what a run sees is a function of the config and the data alone: processes, workers and threads only share out who
    reads, packs and decodes which rows. `get_state` and `set_state` make it go on exactly where it was.

    Where the data ends, the sequences of rows do not end with the same batch: those that are at their end are empty in
    the last batches, and all are empty behind them, for ever.

    Args:
      config: of the run, resolved; model and data are read.
      tokenizer: its special tokens must be those of the model.
      process_index, process_count: of this process, which has the rows of a batch from B * index / count on.
    Returns:
      An iterator of `Batch` with numpy arrays of data.batch_size / process_count rows.
    Raises:
      InputError: the config is not possible, or a source cannot be read or is empty.
    """
    data = config.data
    is_even = data.batch_size % process_count == 0
    require(is_even, "data.batch_size", data.batch_size, f"a multiple of the {process_count} processes")
    encode, shape = make_encoder(config, tokenizer), RowShape.from_config(data, config.model)
    sources = open_sources(data)
    num_rows = data.batch_size // process_count
    num_parts = min(num_rows, max(1, data.num_workers))
    cache = open_cache(data, num_writers=num_parts * process_count)
    mixture = mix_sources(data, sources, encode)
    make_packers = functools.partial(_make_packers, mixture, data.batch_size, shape, Rules.from_config(data), cache)
    write = functools.partial(assemble, shape=shape, tokens=tokenizer.tokens, weighting=data.loss_weighting)
    shards = range(num_rows * process_index, num_rows * (process_index + 1))
    parts = [
        PackedRows(part.tolist(), make_packers, write, num_threads(data.num_workers))
        for part in np.array_split(shards, num_parts)
    ]
    batches = read_in_workers(parts).map(_join) if data.num_workers else parts[0]
    fingerprints = {name: documents.fingerprint() for name, documents in sources.items()}
    return TrainIterator(Prefetch(iter(batches), PREFETCHED_BATCHES), data.batch_size, fingerprints)


def _make_packers(
    mixture: grain.MapDataset,
    num_shards: int,
    shape: RowShape,
    rules: Rules,
    cache: Cache | None,
    shards: Sequence[int],
) -> list[Packer]:
    judge = Judge(rules.max_left_out)
    return [Packer(mixture[shard::num_shards], shape, rules, judge.tally(), cache) for shard in shards]


def _join(parts: Sequence[Batch]) -> Batch:
    """One batch of the rows of several."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS}
    return Batch(**arrays)  # type: ignore[arg-type]  # numpy arrays on the host


def make_encoder(config: RunConfig, tokenizer: Tokenizer) -> Encoder:
    """What encodes the documents of a run.

    Raises:
      InputError: the tokenizer is not the model's.
    """
    model = config.model
    if tokenizer.tokens != model.tokens:
        raise InputError(
            f"tokenizer={config.tokenizer!r} does not belong to the model: its special tokens are {tokenizer.tokens}, "
            f"and model.tokens is {model.tokens}."
        )
    if tokenizer.vocab_size > model.text.vocab_size:
        raise InputError(
            f"model.text.vocab_size={model.text.vocab_size} is too small for tokenizer={config.tokenizer!r}, "
            f"which has {tokenizer.vocab_size} tokens."
        )
    chat_template(tokenizer)  # so that one that cannot be read is told before the first step
    return Encoder(tokenizer, model.vision, config.data.soft_tokens_per_image, model.audio)


def held_out_source(data: DataConfig) -> str | None:
    """The first source that is drawn from and holds documents back, by name; None if there is none."""
    return next((name for name, source in data.mixture.items() if holds_back(source)), None)


def held_out_rows(config: RunConfig, tokenizer: Tokenizer, source: str, num_documents: int) -> list[list[Example]]:
    """The first documents that a source holds back, packed; the same on every call and in every process.

    Args:
      config: of the run, resolved; model and data are read.
      tokenizer: as in `make_train_iterator`.
      source: name of one of `data.sources`. One of weight 0 that holds nothing back is read whole.
      num_documents: documents to read, at most.
    Returns:
      Rows of examples.
    Raises:
      InputError: the source cannot be read or holds nothing back, or none of its documents can be used.
    """
    encode, shape = make_encoder(config, tokenizer), RowShape.from_config(config.data, config.model)
    # Made-up documents depend on a seed, which here is no run's own: what runs are measured on is the same.
    documents = open_documents(config.data.sources[source], split="held_out")
    examples = grain.MapDataset.source(Examples(source, documents, encode))[:num_documents]
    rules = Rules.from_config(config.data)
    rows = list(iter(Packer(examples, shape, rules, Judge(rules.max_left_out).tally()).next_row, None))
    if not rows:
        raise InputError(f"None of the first {num_documents} held-out documents of {source!r} can be used.")
    return rows
