"""Every rule a run config must keep, checked before anything heavy is imported. Pure Python.

A rule that a room below keeps is not repeated: the architecture's are in gemma4_jax.config, those of the mesh in
gemma4_jax.sharding, and those of a packed row in gemma4_jax.data.pack.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gemma4_jax.errors import InputError
from gemma4_jax.files import LOCAL, is_remote
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

OPTIONAL_SECTIONS = ("model.vision", "model.audio")
"""Sections that may be None: the model has no such tower."""

FREE_SECTIONS: dict[str, Any] = {"data.mixture": 1.0, "data.sources": "text"}
"""Sections whose names are the user's -> an example of their values."""


class Range(NamedTuple):
    """What a number or a word may be: a test, and the same in words."""

    holds: Callable[[Any], bool]
    accepted: str


def _at_least(low: float) -> Range:
    return Range(lambda value: value >= low, f"at least {low}")


def _one_of(*values: Any) -> Range:
    return Range(lambda value: value in values, f"one of {', '.join(map(str, values))}")


_SEED = Range(lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1")
_POSITIVE = Range(lambda value: value > 0, "greater than 0")
_FRACTION = Range(lambda value: 0 <= value <= 1, "between 0 and 1")
_BELOW_ONE = Range(lambda value: 0 <= value < 1, "at least 0 and less than 1")
_NOT_EMPTY = Range(lambda value: bool(value.strip()), "a name, not empty")
_NO_ADDRESS = Range(lambda value: not is_remote(value), LOCAL)
_PATH = Range(lambda value: bool(value.strip()) and not is_remote(value), LOCAL)

RANGES: dict[str, Range] = {
    "name": _NOT_EMPTY,
    "seed": _SEED,
    "run_dir": _PATH,
    "tokenizer": _PATH,
    "init.from_hf": _NO_ADDRESS,
    "init.from_run": _NO_ADDRESS,
    "export.dir": _NO_ADDRESS,
    "data.seq_len": _at_least(2),
    "data.images_per_row": _at_least(0),
    "data.patches_per_row": _at_least(0),
    "data.soft_tokens_per_image": _one_of(*SOFT_TOKEN_BUDGETS),
    "data.batch_size": _at_least(1),
    "data.num_workers": _at_least(0),
    "data.long_masked": _one_of("drop", "cut_context"),
    "data.max_left_out": _BELOW_ONE,
    "data.seed": _SEED,
    "train.num_steps": _at_least(1),
    "train.grad_accum_steps": _at_least(1),
    "train.compute_dtype": _one_of("auto", "bfloat16", "float32"),
    "train.attention": _NOT_EMPTY,
    "train.experts": _NOT_EMPTY,
    "train.remat": _one_of("none", "dots", "full"),
    "train.loss_chunk": _at_least(1),
    "train.load_balance_weight": _at_least(0),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _at_least(0),
    "optimizer.final_learning_rate_fraction": _FRACTION,
    "optimizer.b1": _BELOW_ONE,
    "optimizer.b2": _BELOW_ONE,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _at_least(0),
    "optimizer.clip_norm": _POSITIVE,
    "optimizer.learning_rate_scale.vision": _at_least(0),
    "optimizer.learning_rate_scale.embedding": _at_least(0),
    "optimizer.learning_rate_scale.decoder": _at_least(0),
    "checkpoint.every_steps": _at_least(1),
    "checkpoint.keep": _at_least(1),
    "eval.every_steps": _at_least(1),
    "eval.num_documents": _at_least(1),
    "eval.batch_size": _at_least(1),
    "log.every_steps": _at_least(1),
}
"""Field -> what it may be, on its own."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The one of `known` that `name` was most likely meant to be: a dotted path is alike in whole and in its leaf."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        leaf = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + leaf

    return max(known, key=likeness)


def leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {dotted path: value}; of sections only the empty ones are listed."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            flat |= leaves(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def check_structure(given: Mapping[str, Any], schema: Mapping[str, Any], prefix: str = "") -> None:
    """Checks that `given` has exactly the fields of `schema`, with values of their types.

    Raises:
      InputError: an unknown field, a missing field, or a value of another type.
    """
    for name in given:
        if name not in schema:
            raise unknown_field(f"{prefix}{name}", f"={given[name]!r}", leaves(schema, prefix))
    for name, example in schema.items():
        path = f"{prefix}{name}"
        if name not in given:
            raise InputError(
                f"{path} is missing: start the config from gemma4_jax.configs.base, which sets every field."
            )
        value = given[name]
        if value is None and path in OPTIONAL_SECTIONS:
            continue
        allowed = type_of(example)
        _require(allowed.holds(value), path, value, allowed.accepted)
        if path in FREE_SECTIONS:
            check_structure(value, dict.fromkeys(value, FREE_SECTIONS[path]), f"{path}.")
        elif isinstance(example, Mapping):
            check_structure(value, example, f"{path}.")


def unknown_field(path: str, value: str, known: Iterable[str]) -> InputError:
    """The error about a field that does not exist; `value` is "=" and what it was given, or empty."""
    section, _, name = path.rpartition(".")
    if section in FREE_SECTIONS:
        given = value.removeprefix("=")
        entry = repr(given) if isinstance(FREE_SECTIONS[section], str) else given or "1.0"
        return InputError(
            f"{path}{value} is not possible: {section} has no {name!r} to change, so give all of it, "
            f'--config.{section}="{{{name!r}: {entry}}}".'
        )
    return InputError(f"{path}{value} is not possible: there is no such field, the nearest is {nearest(path, known)}.")


def type_of(example: Any) -> Range:
    """What may stand in the place of `example`, by its type: an int may stand for a float, a list for a tuple."""
    if isinstance(example, bool):
        return Range(lambda value: isinstance(value, bool), "true or false")
    if isinstance(example, int):
        return Range(lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number")
    if isinstance(example, float):
        return Range(_is_finite, "a finite number")
    if isinstance(example, str):
        return Range(lambda value: isinstance(value, str), "text")
    if isinstance(example, Mapping):
        return Range(lambda value: isinstance(value, Mapping), "a dictionary")
    return Range(
        lambda value: isinstance(value, tuple | list) and len(value) == len(example), f"{len(example)} numbers"
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_values(config: Any) -> None:
    """Checks every field on its own, and against the others where no room below does.

    Args:
      config: the run config, its structure already checked.
    Raises:
      InputError: the first rule that does not hold.
    """
    values = leaves(config.to_dict())
    for path, allowed in RANGES.items():
        _require(allowed.holds(values[path]), path, values[path], allowed.accepted)
    train, optimizer, data = config.train, config.optimizer, config.data
    _require(
        data.batch_size % train.grad_accum_steps == 0,
        "train.grad_accum_steps", train.grad_accum_steps, f"a divisor of data.batch_size={data.batch_size}",
    )  # fmt: skip
    _require(
        data.seq_len % train.loss_chunk == 0,
        "train.loss_chunk", train.loss_chunk, f"a divisor of data.seq_len={data.seq_len}",
    )  # fmt: skip
    _require(
        optimizer.warmup_steps < train.num_steps,
        "optimizer.warmup_steps", optimizer.warmup_steps, f"less than train.num_steps={train.num_steps}",
    )  # fmt: skip
    _require(
        not (config.init.from_hf and config.init.from_run),
        "init.from_run", config.init.from_run, f"empty where init.from_hf={config.init.from_hf!r} is given",
    )  # fmt: skip
    scales = optimizer.learning_rate_scale.to_dict()
    _require(any(scales.values()), "optimizer.learning_rate_scale", scales, "above 0 for at least one group")
    _require(
        data.images_per_row > 0 or config.model.vision is None or scales["vision"] == 0,
        "optimizer.learning_rate_scale.vision", scales["vision"],
        "0 where data.images_per_row=0 lets the vision tower see nothing: it would only decay",
    )  # fmt: skip


def check_batch(config: Any, mesh: Mapping[str, int]) -> None:
    """Checks that the rows of a batch, cut into its accumulation steps, and their positions spread evenly.

    Args:
      config: the run config.
      mesh: mesh axis -> devices along it.
    Raises:
      InputError: they do not.
    """
    rows = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    steps = config.train.grad_accum_steps
    sizes = f"data={mesh['data']}, fsdp={mesh['fsdp']}, expert={mesh['expert']}"
    _require(
        config.data.batch_size % (rows * steps) == 0,
        "data.batch_size", config.data.batch_size,
        f"a multiple of {rows * steps}: {rows} shards of rows ({sizes}) times train.grad_accum_steps={steps}",
    )  # fmt: skip
    _require(
        config.eval.batch_size % rows == 0,
        "eval.batch_size", config.eval.batch_size, f"a multiple of the {rows} shards of rows ({sizes})",
    )  # fmt: skip
    _require(
        config.data.seq_len % mesh["context"] == 0,
        "data.seq_len", config.data.seq_len, f"a multiple of mesh.context={mesh['context']}",
    )  # fmt: skip


def _require(condition: bool, field: str, value: Any, accepted: str) -> None:
    if not condition:
        raise InputError(f"{field}={value!r} is not possible: it must be {accepted}.")
