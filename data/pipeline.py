"""From a run's config to batches: sources, mixture, shuffle, shards, packing, prefetch."""

import functools

import grain

from gemma4_jax.data.assemble import assemble
from gemma4_jax.data.chat_templates import chat_template
from gemma4_jax.data.documents import holds_back, open_documents
from gemma4_jax.data.encode import Encoder, Example
from gemma4_jax.data.iterator import TrainIterator
from gemma4_jax.data.mixture import Examples, mix_sources, open_sources
from gemma4_jax.data.pack import PackIterDataset, RowShape, Rules
from gemma4_jax.data.workers import Prefetch, read_in_workers
from gemma4_jax.errors import InputError
from gemma4_jax.fields import require
from gemma4_jax.run_config import DataConfig, RunConfig
from gemma4_jax.tokenizer import Tokenizer

PREFETCHED_BATCHES = 2


# One thread reads, packs and runs ahead of the training step; more would only take turns with it.
_READ_IN_PLACE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def make_train_iterator(
    config: RunConfig, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
) -> TrainIterator:
    """The endless training batches of one process.

    Documents are drawn from the sources in the proportions of their weights, each source in a new random order every
    epoch. Document n of that sequence goes to process n modulo `process_count`, which packs it. What an iterator
    yields depends on nothing but the config, the data and the process; `get_state` and `set_state` make it go on
    exactly where it was, and Orbax saves it.

    Args:
      config: of the run, resolved; model and data are read.
      tokenizer: its special tokens must be those of the model.
      process_index, process_count: of this process.
    Returns:
      An iterator of `Batch` with numpy arrays of data.batch_size / process_count rows.
    Raises:
      InputError: the config is not possible, or a source cannot be read or is empty.
    """
    data = config.data
    is_even = data.batch_size % process_count == 0
    require(is_even, "data.batch_size", data.batch_size, f"a multiple of the {process_count} processes")
    encode, shape = _encoder(config, tokenizer), RowShape.from_config(data, config.model)
    sources = open_sources(data)
    examples = mix_sources(data, sources, encode)[process_index::process_count]
    rows = PackIterDataset(examples.to_iter_dataset(_READ_IN_PLACE), shape, Rules.from_config(data))
    write = functools.partial(assemble, shape=shape, tokens=tokenizer.tokens)
    batches = rows.batch(data.batch_size // process_count, batch_fn=write)
    if data.num_workers:
        batches = read_in_workers(batches, data.num_workers)
    fingerprints = {name: documents.fingerprint() for name, documents in sources.items()}
    return TrainIterator(Prefetch(iter(batches), PREFETCHED_BATCHES), data.num_workers, fingerprints)


def _encoder(config: RunConfig, tokenizer: Tokenizer) -> Encoder:
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
    encode, shape = _encoder(config, tokenizer), RowShape.from_config(config.data, config.model)
    # Made-up documents depend on a seed, which here is no run's own: what runs are measured on is the same.
    documents = open_documents(config.data.sources[source], split="held_out")
    examples = grain.MapDataset.source(Examples(source, documents, encode))[:num_documents]
    rows = list(PackIterDataset(examples.to_iter_dataset(_READ_IN_PLACE), shape, Rules.from_config(config.data)))
    if not rows:
        raise InputError(f"None of the first {num_documents} held-out documents of {source!r} can be used.")
    return rows
