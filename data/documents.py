"""The documents of a source: its records, those of one side of the split, each made a document by its task."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma4_jax.data.document import Document, Image, Pair, Segment, Sound
from gemma4_jax.data.image_rules import ImageRules, with_budgets
from gemma4_jax.data.signatures import (
    check_options,
    columns_of,
    parameters_of,
    required,
    takes_others,
)
from gemma4_jax.data.sound_pieces import cut_sounds
from gemma4_jax.data.sources import KINDS, Source
from gemma4_jax.data.tasks import TASKS
from gemma4_jax.data.tasks.auto import check_columns
from gemma4_jax.errors import InputError
from gemma4_jax.fields import find, require
from gemma4_jax.run_config import SourceConfig

MAX_SEGMENTS, MAX_FILES_BYTES = 4096, 2**28
"""Of a document; the bytes are those of all files that its record names."""

SOFT_TOKENS = "soft_tokens"
"""The column, for every task, of the budgets of a record's images: `with_budgets`."""


_NO_PAIRS = (
    "a record is a pair of answers, and no objective reads pairs yet. The chosen answers alone can be trained on by "
    "task='chat' with columns={'messages': 'chosen'}, or {'completion': 'chosen'} where the prompt is a column."
)


class Documents:
    """Documents by index, the same whenever and wherever they are asked for.

    Args:
      source: of records.
      task: makes documents of their columns.
      columns: what the task calls a column -> what a record calls it.
      indices: of the records that are read; None for all.
      rules: for images.
    """

    def __init__(
        self,
        source: Source,
        task: Callable[..., Document | Pair],
        columns: Mapping[str, str],
        indices: np.ndarray | None,
        rules: ImageRules,
    ) -> None:
        self._rules = rules
        self._source = source
        self._task = task
        self._columns = columns
        self._indices = indices
        self._required = sorted(required(parameters_of(task)) & columns.keys())
        self._takes_others = takes_others(task)
        self._options = parameters_of(task).keys() - columns_of(task).keys()  # no record sets one

    def __len__(self) -> int:
        return len(self._source) if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> Document:
        """A document.

        Raises:
          InputError: as `read`, or it is a pair.
        """
        document = self.read(index)
        if isinstance(document, Pair):
            raise InputError(f"{document.chosen.name}: {_NO_PAIRS}")
        return document

    def read(self, index: int) -> Document | Pair:
        """A document, or a pair of two.

        Raises:
          InputError: its record, or a file that this names, cannot be read or used.
        """
        record = index if self._indices is None else int(self._indices[index])
        name = self._source.name(record)
        try:
            columns = self._source[record]
            arguments = self._arguments(columns)
            budgets = arguments.pop(SOFT_TOKENS, None) if SOFT_TOKENS in self._columns else None
            made = self._made(arguments, columns)
            if isinstance(made, Pair):
                sides = made.chosen, made.rejected
                chosen, rejected = (self._with_files(side, record, name, budgets) for side in sides)
                return Pair(chosen, rejected, made.num_prompt)
            return self._with_files(made, record, name, budgets)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def _made(self, arguments: Mapping[str, Any], columns: Mapping[str, Any]) -> Document | Pair:
        """What the task makes of a record; a column that is named and not there is likely why it cannot."""
        try:
            return self._task(**arguments)
        except InputError as error:
            gone = [column for role, column in self._columns.items() if role != column and column not in columns]
            hint = f" It has no column {gone[0]!r}, which the config names." if gone else ""
            raise InputError(f"{error}{hint}") from error

    def _with_files(self, document: Document, record: int, name: str, budgets: Any) -> Document:
        """A document with its name, the bytes of the files that it names, and the budgets of its images."""
        if len(document.segments) > MAX_SEGMENTS:
            raise InputError(f"{len(document.segments)} segments are refused: a document may have {MAX_SEGMENTS}.")
        document = self._rules.limit(with_budgets(document, budgets))
        segments = self._read_files(document, record)
        num_missing = document.images_missing + len(document.segments) - len(segments)
        document = dataclasses.replace(document, segments=segments, name=name, images_missing=num_missing)
        return cut_sounds(self._rules.spend(document))

    @property
    def encoding(self) -> Mapping[str, Any] | None:
        """As that of the source."""
        return self._source.encoding

    def fingerprint(self) -> dict[str, Any]:
        """As that of the source: the config says what is made of the records."""
        return self._source.fingerprint()

    def _arguments(self, record: Any) -> dict[str, Any]:
        """The columns of a record by the names of the task."""
        if not isinstance(record, Mapping):
            raise InputError(f"a record must have columns, and is {record!r:.100}.")
        arguments = {role: record[column] for role, column in self._columns.items() if column in record}
        for role in self._required:
            if role not in arguments:
                columns = ", ".join(map(str, record))
                raise InputError(f"it has no column {self._columns[role]!r}: its columns are {columns:.200}.")
        if self._takes_others:
            taken = {*self._columns.values(), *self._columns, *self._options}
            arguments |= {name: value for name, value in record.items() if name not in taken}
        return arguments

    def _read_files(self, document: Document, record: int) -> tuple[Segment, ...]:
        """The segments of a document with the bytes of the files that they name; without images that may be missing."""
        segments: list[Segment] = []
        left = MAX_FILES_BYTES
        for segment in document.segments:
            if isinstance(segment, Image | Sound) and isinstance(segment.content, str):
                try:
                    content = self._source.read_file(record, segment.content, type(segment).__name__.lower())
                except InputError:
                    if isinstance(segment, Image) and segment.may_be_missing:
                        continue
                    raise
                segment = dataclasses.replace(segment, content=content)
                left -= len(content)
                if left < 0:
                    raise InputError(f"its files have more than the {MAX_FILES_BYTES} bytes that are read.")
            segments.append(segment)
        return tuple(segments)


def holds_back(config: SourceConfig) -> bool:
    """Whether a source has documents that training never sees.

    Raises:
      InputError: there is no such kind, or its path cannot be opened.
    """
    kind = _kind_of(config)
    if "path" in parameters_of(kind) and _splits_itself(kind):  # what is there says it, not the kind
        return len(_open(config, kind, {"path": config.path, "split": "held_out", "seed": 0}, config.options)) > 0
    return config.held_out > 0 or _splits_itself(kind)


def makes_up(config: SourceConfig) -> bool:
    """Whether a source has no documents but those that it makes up as they are read.

    Raises:
      InputError: there is no such kind.
    """
    return "seed" in parameters_of(_kind_of(config))


def open_documents(
    config: SourceConfig, *, split: str = "train", seed: int = 0, takes_pairs: bool = False
) -> Documents:
    """Opens a source.

    Args:
      config: of the source.
      split: "train", or "held_out" for the documents that training never sees; of a source of weight 0 that holds none
        back, these are all.
      seed: of kinds whose documents are made up as they are read.
      takes_pairs: whether they are asked for by `Documents.read`.
    Raises:
      InputError: there is no such kind, task, column, option or data, or no document on this side of the split; or the
        task makes pairs, which are not taken.
    """
    if config.task == "preference" and not takes_pairs:
        raise InputError(f"{config.section}.task={config.task!r} is not possible here: {_NO_PAIRS}")
    kind, task = _kind_of(config), find(TASKS, f"{config.section}.task", config.task)
    of_kind = {name: p for name, p in parameters_of(kind).items() if name not in _GIVEN}
    of_task = {name: p for name, p in parameters_of(task).items() if name not in required(columns_of(task))}
    kind_options, task_options, of_images = check_options(
        f"{config.section}.options", config.options, of_kind, of_task, parameters_of(ImageRules)
    )
    try:
        rules = ImageRules(**of_images)
    except InputError as error:
        raise InputError(f"{config.section}.options.{error}") from error
    source = _open(config, kind, {"path": config.path, "split": split, "seed": seed}, kind_options)
    task = functools.partial(task, **task_options)
    indices = None if _splits_itself(kind) else _side(config, len(source), split)
    documents = Documents(source, task, _columns(config, source, task), indices, rules)
    if len(documents) == 0:
        held_out = f"{config.section}.held_out={config.held_out}"
        of = f" on the side {split!r} of its split, {held_out}" if len(source) else ""
        raise InputError(f"The source {config.name!r} has no documents{of}: give it some, or set its weight to 0.")
    return documents


_GIVEN = ("path", "split", "seed")
"""Parameters of a kind that are no options."""


def _kind_of(config: SourceConfig) -> Callable[..., Source]:
    return find(KINDS, f"{config.section}.kind", config.kind)


def _splits_itself(kind: Callable[..., Source]) -> bool:
    return "split" in parameters_of(kind)


def _open(
    config: SourceConfig, kind: Callable[..., Source], given: Mapping[str, Any], options: Mapping[str, Any]
) -> Source:
    parameters, section = parameters_of(kind), config.section
    if "path" in parameters:
        require(bool(config.path), f"{section}.path", config.path, f"where the records are, for {config.kind!r}")
    else:
        require(not config.path, f"{section}.path", config.path, f"empty, as {config.kind!r} reads no path")
    if _splits_itself(kind):
        why = f"0, as {config.kind!r} holds documents back by itself"
        require(config.held_out == 0, f"{section}.held_out", config.held_out, why)
    try:
        return kind(**{name: value for name, value in given.items() if name in parameters}, **options)
    except InputError as error:
        raise InputError(f"{section}: {error}") from error


def _columns(config: SourceConfig, source: Source, task: Callable[..., Document | Pair]) -> dict[str, str]:
    """What the task calls a column -> what a record calls it."""
    columns = columns_of(task)
    for role, column in config.columns.items():
        if role not in columns and not takes_others(task) and role != SOFT_TOKENS:
            raise InputError(
                f"{config.section}.columns.{role}={column!r} is not possible: the task {config.task!r} reads no column "
                f"{role!r} but {', '.join(columns)}."
            )
    named = {name: config.columns.get(name, name) for name in {**columns, **config.columns}}
    for role in sorted(required(columns) | config.columns.keys()) if source.columns is not None else ():
        accepted = f"one of the columns of its records, {', '.join(source.columns or ())}"
        require(named[role] in (source.columns or ()), f"{config.section}.columns.{role}", named[role], accepted)
    if config.task == "auto" and source.columns is not None:
        roles = [role for role, column in named.items() if column in source.columns and role != SOFT_TOKENS]
        try:
            check_columns(dict.fromkeys([*source.columns, *roles]))
        except InputError as error:
            raise InputError(f"{config.section}: {error}") from error
    return named


def _side(config: SourceConfig, num_records: int, split: str) -> np.ndarray | None:
    """The records on one side of the split; None for all."""
    if config.held_out > 0:
        return choose_indices(num_records, config.held_out, is_held_out=split == "held_out")
    if split == "held_out" and config.weight > 0:
        raise InputError(
            f"{config.section} holds no documents back: give it a share in {config.section}.held_out, or evaluate on a "
            "source of weight 0, which is read whole."
        )
    return None


_BLOCK = 2**20
"""Records whose hashes are in memory at one time."""


def choose_indices(num_records: int, share: float, *, is_held_out: bool) -> np.ndarray:
    """The records that are held out, or those that are not: a hash of its index decides of each.

    So nothing else moves a record to the other side: no seed, no record that is added behind, and a larger share takes
    only more.

    Args:
      num_records: N.
      share: that is held out, at least 0 and less than 1.
      is_held_out: the side.
    Returns:
      [n] ascending indices, uint32 where these suffice and else uint64.
    """
    dtype = np.uint32 if num_records <= 2**32 else np.uint64
    chosen = []
    for start in range(0, num_records, _BLOCK):
        indices = np.arange(start, min(start + _BLOCK, num_records), dtype=np.uint64)
        is_below = _hash(indices) < np.uint64(share * 2**64)
        chosen.append(indices[is_below == is_held_out].astype(dtype))
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype)


def _hash(indices: np.ndarray) -> np.ndarray:
    """[n] uint64 to as many that look random: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = (indices + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
