"""From `config.data` to batches: sources, mixture, shuffle, shards, packing, prefetch."""

import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from gemma4_jax.batch import Batch
from gemma4_jax.config import Gemma4Config
from gemma4_jax.data.assemble import assemble
from gemma4_jax.data.images import join_patches
from gemma4_jax.data.iterator import TrainIterator
from gemma4_jax.data.mixture import mix_sources, open_sources, source_spec
from gemma4_jax.data.pack import PackIterDataset, RowShape, Rules
from gemma4_jax.data.sources import BUNDLED, open_source
from gemma4_jax.data.tokenize import DocumentTokenizer, Example, TokenizedSource
from gemma4_jax.data.workers import Prefetch, read_in_workers
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer

PREFETCHED_BATCHES = 2


# One thread reads, packs and runs ahead of the training step; more would only take turns with it.
_READ_IN_PLACE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True)
class EvalItem:
    """One question of an evaluation batch.

    Attributes:
      row: of the batch.
      start, stop: the tokens start..stop-1 of the row are the answer, with the line break that ends it; what comes
        before them in their segment is the prompt.
      text: the answer, without the line break.
      pixels: uint8 [height, width, 3], the image as the model sees it.
    """

    row: int
    start: int
    stop: int
    text: str
    pixels: np.ndarray


def make_train_iterator(
    config: Any, model_config: Gemma4Config, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
) -> TrainIterator:
    """The endless training batches of one process.

    Documents are drawn from the sources in the proportions of `data.mixture`, each source in a new random order every
    epoch. Document n of that sequence goes to process n modulo `process_count`, which packs it. What an iterator
    yields depends on nothing but the config, the data and the process; `get_state` and `set_state` make it go on
    exactly where it was, and Orbax saves it.

    Args:
      config: the run config; `config.data` is read.
      model_config: of the model that will read the batches.
      tokenizer: its special tokens must be those of the model.
      process_index, process_count: of this process.
    Returns:
      An iterator of `Batch` with numpy arrays of data.batch_size / process_count rows.
    Raises:
      InputError: if the config is not possible, or a source cannot be read or is empty.
    """
    data = config.data
    if data.batch_size < 1 or data.batch_size % process_count:
        raise InputError(f"data.batch_size={data.batch_size} must be a multiple of the {process_count} processes.")
    tokenize = _document_tokenizer(config, model_config, tokenizer)
    shape = RowShape.from_config(data, model_config)
    sources = open_sources(data)
    examples = mix_sources(data, sources, tokenize)[process_index::process_count]
    rows = PackIterDataset(examples.to_iter_dataset(_READ_IN_PLACE), shape, Rules.from_config(data))
    write = functools.partial(assemble, shape=shape, tokens=tokenizer.tokens)
    batches = rows.batch(data.batch_size // process_count, batch_fn=write)
    if data.num_workers:
        batches = read_in_workers(batches, data.num_workers)
    fingerprints = {name: source.fingerprint() for name, source in sources.items()}
    return TrainIterator(Prefetch(iter(batches), PREFETCHED_BATCHES), data.num_workers, fingerprints)


def _document_tokenizer(config: Any, model_config: Gemma4Config, tokenizer: Tokenizer) -> DocumentTokenizer:
    if tokenizer.tokens != model_config.tokens:
        raise InputError(
            f"tokenizer={config.tokenizer!r} does not belong to the model: its special tokens are {tokenizer.tokens}, "
            f"and model.tokens is {model_config.tokens}."
        )
    if tokenizer.vocab_size > model_config.text.vocab_size:
        raise InputError(
            f"model.text.vocab_size={model_config.text.vocab_size} is too small for tokenizer={config.tokenizer!r}, "
            f"which has {tokenizer.vocab_size} tokens."
        )
    return DocumentTokenizer(tokenizer, model_config.vision, config.data.soft_tokens_per_image)


def eval_source(config: Any) -> str | None:
    """The source to evaluate on: eval.source, or else the first of data.mixture that keeps documents back, if any."""
    data = config.data
    if config.eval.source:
        return config.eval.source
    kept_back = (name for name, weight in data.mixture.items() if weight and source_spec(data, name) in BUNDLED)
    return next(kept_back, None)


def eval_batches(
    config: Any, model_config: Gemma4Config, tokenizer: Tokenizer, batch_size: int
) -> list[tuple[Batch, list[EvalItem]]]:
    """The documents of `eval_source`, packed; the same on every call and in every process.

    Args:
      config: the run config; `config.data` and `config.eval` are read.
      model_config, tokenizer: as in `make_train_iterator`.
      batch_size: rows of each batch; the last is filled up with rows of padding.
    Returns:
      Batches, and of "digits" one item for every document in it; none if there is nothing to evaluate on.
    Raises:
      InputError: if the config is not possible, or no document can be used.
    """
    source = eval_source(config)
    if source is None:
        return []
    tokenize = _document_tokenizer(config, model_config, tokenizer)
    shape = RowShape.from_config(config.data, model_config)
    spec = source_spec(config.data, source)
    documents = open_source(spec, split="held_out" if spec in BUNDLED else "train")
    examples = grain.MapDataset.source(TokenizedSource(source, documents, tokenize))[: config.eval.num_documents]
    rules = Rules.from_config(config.data)
    rows = list(PackIterDataset(examples.to_iter_dataset(_READ_IN_PLACE), shape, rules))
    if not rows:
        raise InputError(
            f"None of the eval.num_documents={config.eval.num_documents} documents of {source!r} can be used."
        )
    rows += [[]] * (-len(rows) % batch_size)
    batches = []
    for start in range(0, len(rows), batch_size):
        batch_rows = rows[start : start + batch_size]
        items = [
            item
            for b, row in enumerate(batch_rows if spec == "digits" else ())
            for item in _eval_items(b, row, model_config, tokenizer)
        ]
        batches.append((assemble(batch_rows, shape, tokenizer.tokens), items))
    return batches


def _eval_items(b: int, row: list[Example], model: Gemma4Config, tokenizer: Tokenizer) -> list[EvalItem]:
    items, start = [], 0
    for example in row:
        if example.images and model.vision:
            image = example.images[0]
            answer = np.flatnonzero(example.carries_loss)[:-1]  # the last is <eos>
            text = tokenizer.decode(example.tokens[answer].tolist()).rstrip("\n")
            pixels = join_patches(image.patches, image.positions, patch_size=model.vision.patch_size)
            items.append(EvalItem(b, start + int(answer[0]), start + int(answer[-1]) + 1, text, pixels))
        start += len(example.tokens)
    return items
