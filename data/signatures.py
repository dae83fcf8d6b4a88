"""What kinds and tasks take, as their parameters say it."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gemma4_jax.errors import InputError
from gemma4_jax.fields import parse, require

Parameters = Mapping[str, inspect.Parameter]

_TYPES = {"bool": bool, "int": int, "float": float, "str": str}
"""Annotations, by name, to which options are held; of other ones anything is taken."""


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """The parameters of a function or a class that have names of their own."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def columns_of(task: Callable[..., Any]) -> Parameters:
    """The columns that a task reads."""
    return {name: p for name, p in parameters_of(task).items() if p.kind is p.POSITIONAL_OR_KEYWORD}


def takes_others(task: Callable[..., Any]) -> bool:
    """Whether a task reads every column of a record, whatever they are called."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(task).parameters.values())


def required(parameters: Parameters) -> set[str]:
    """Those without a default."""
    return {name for name, p in parameters.items() if p.default is p.empty}


def check_options(section: str, options: Mapping[str, Any], *takers: Parameters) -> list[dict[str, Any]]:
    """Shares options out among those who take them.

    Args:
      section: of the config that gives them.
      options: name -> value.
      takers: the options that each of some functions takes.
    Returns:
      For each of them name -> value.
    Raises:
      InputError: one is not taken by any, is missing, or is not of the annotated type.
    """
    taken = [name for parameters in takers for name in parameters]
    for name, value in options.items():
        accepted = f"one of the options {', '.join(taken)}" if taken else "left out, as there are no options"
        require(name in taken, f"{section}.{name}", value, accepted)
    shares: list[dict[str, Any]] = []
    for parameters in takers:
        if missing := sorted(required(parameters) - options.keys()):
            raise InputError(f"{section}.{missing[0]} is missing: it has no default.")
        given = {name: value for name, value in options.items() if name in parameters}
        hints = [(name, _type_of(parameters[name])) for name in given]
        shares.append(dict(vars(parse(dataclasses.make_dataclass("Options", hints), given, section))))
    return shares


def _type_of(parameter: inspect.Parameter) -> Any:
    annotation = parameter.annotation
    return _TYPES.get(getattr(annotation, "__name__", annotation), Any)
