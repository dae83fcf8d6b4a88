"""Frozen dataclasses whose fields carry what they mean and what they may be; and dictionaries parsed into them.

    @dataclasses.dataclass(frozen=True)
    class LogConfig(Section):
        section = "log"
        every_steps: int = field(10, "Steps between lines of metrics.jsonl.", at_least(1))

Pure Python: importing this module does not import jax.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from gemma4_jax.errors import InputError

T = TypeVar("T")


class Rule(NamedTuple):
    """What a value may be: a test, and the same in words."""

    holds: Callable[[Any], bool]
    accepted: str


def at_least(low: float) -> Rule:
    """No less than `low`."""
    return Rule(lambda value: value >= low, f"at least {low}")


def one_of(*values: Any) -> Rule:
    """One of these."""
    return Rule(lambda value: value in values, f"one of {', '.join(map(str, values))}")


POSITIVE = Rule(lambda value: value > 0, "greater than 0")
FRACTION = Rule(lambda value: 0 <= value <= 1, "between 0 and 1")
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "at least 0 and less than 1")
SEED = Rule(lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1")
NOT_EMPTY = Rule(lambda value: bool(value.strip()), "a name, not empty")


def field(default: Any, meaning: str, rule: Rule | None = None) -> Any:
    """A field of a `Section`.

    Args:
      default: its value where none is given; dictionaries are copied.
      meaning: what it is, for people.
      rule: that every value keeps, beside being of the annotated type.
    """
    metadata = {"meaning": meaning, "rule": rule}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a config that cannot be made with a value that its rules forbid.

    Attributes:
      section: its dotted path, for messages.
    """

    section: ClassVar[Any] = ""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            rule, value = item.metadata.get("rule"), getattr(self, item.name)
            if rule is not None:
                require(rule.holds(value), f"{self.section}.{item.name}".lstrip("."), value, rule.accepted)


def require(condition: bool, path: str, value: Any, accepted: str) -> None:
    """Refuses the value of a field unless the condition holds.

    Raises:
      InputError: it does not.
    """
    if not condition:
        raise InputError(f"{path}={value!r} is not possible: it must be {accepted}.")


def parse(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Makes a dataclass of nested dictionaries, such as JSON and ConfigDict hold; fields left out get their default.

    An int may stand for a float and a list for a tuple.

    Args:
      kind: the dataclass.
      values: field -> value.
      path: dotted path of the section, for messages.
    Raises:
      InputError: an unknown field, one that is missing and has no default, a value of another type, or one that a rule
        forbids.
    """
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass
    prefix = f"{path}." if path else ""
    for name, value in values.items():
        if name not in known:
            near = [prefix + other for other in [*known, *leaf_names(kind)]]
            raise unknown_field(f"{prefix}{name}", f"={value!r}", near)
    hints = typing.get_type_hints(kind)
    given = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    for name, item in known.items():
        if name not in given and item.default is item.default_factory is dataclasses.MISSING:
            raise InputError(f"{prefix}{name} is missing: it must be {_words(hints[name])}.")
    return kind(**given)


def to_dict(value: Any) -> Any:
    """The inverse of `parse`: dataclasses as dictionaries, all the way down."""
    if dataclasses.is_dataclass(value):
        return {item.name: to_dict(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        entries = {name: to_dict(inner) for name, inner in value.items()}
        named = [name for name, inner in value.items() if dataclasses.is_dataclass(inner)]
        return entries | {name: {k: v for k, v in entries[name].items() if k != "name"} for name in named}
    return tuple(map(to_dict, value)) if isinstance(value, tuple) else value


def _convert(hint: Any, value: Any, path: str) -> Any:
    """A value as the type that an annotation names."""
    if isinstance(hint, types.UnionType):  # of one type and None
        return None if value is None else _convert(typing.get_args(hint)[0], value, path)
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            return value
        require(isinstance(value, Mapping), path, value, "a dictionary")
        return parse(hint, value, path)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Mapping:
        require(isinstance(value, Mapping), path, value, "a dictionary")
        return {name: _entry(arguments[1], name, inner, f"{path}.{name}") for name, inner in value.items()}
    if origin is tuple:
        items = [arguments[0]] * len(value) if arguments[-1] is ... and isinstance(value, tuple | list) else arguments
        is_right = isinstance(value, tuple | list) and len(value) == len(items)
        require(is_right, path, value, _words(hint))
        return tuple(
            _convert(item, inner, f"{path}[{i}]") for i, (item, inner) in enumerate(zip(items, value, strict=True))
        )
    if hint is not Any:
        require(_TYPES[hint].holds(value), path, value, _TYPES[hint].accepted)
    return value


def _entry(hint: Any, name: str, value: Any, path: str) -> Any:
    """An entry of a dictionary whose names are the user's: a section among them knows its own."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        value = {**value, "name": name}
    return _convert(hint, value, path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TYPES: dict[Any, Rule] = {
    bool: Rule(lambda value: isinstance(value, bool), "true or false"),
    int: Rule(lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: Rule(_is_number, "a finite number"),
    str: Rule(lambda value: isinstance(value, str), "text"),
}


def _words(hint: Any) -> str:
    """An annotation in words."""
    if typing.get_origin(hint) is tuple:
        arguments = typing.get_args(hint)
        return "a list" if arguments[-1] is ... else f"{len(arguments)} numbers"
    return _TYPES[hint].accepted if hint in _TYPES else "a dictionary"


def accepted_type(kind: type, path: str) -> str:
    """What the type of the field at a dotted path accepts, in words."""
    hint: Any = kind
    for name in path.split("."):
        if isinstance(hint, types.UnionType):
            hint = typing.get_args(hint)[0]
        if typing.get_origin(hint) is Mapping:
            hint = typing.get_args(hint)[1]
        elif dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(name, Any)
    return _words(hint)


def leaf_names(kind: Any) -> list[str]:
    """Dotted paths of all fields below a dataclass that are no sections themselves."""
    names = []
    for name, hint in typing.get_type_hints(kind).items():
        if typing.get_origin(hint) is ClassVar:
            continue
        inner = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
        names += [f"{name}.{leaf}" for leaf in leaf_names(inner)] if dataclasses.is_dataclass(inner) else [name]
    return names


def describe(kind: Any, prefix: str = "") -> list[str]:
    """Lines about every field with a meaning below a dataclass: its path, default and meaning."""
    lines, hints = [], typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint, name = hints[item.name], f"{prefix}{item.name}"
        if "meaning" in item.metadata:
            default = {} if item.default is dataclasses.MISSING else item.default
            lines.append(f"{name} = {default!r}: {item.metadata['meaning']}")
        if typing.get_origin(hint) is Mapping:
            hint, name = typing.get_args(hint)[1], f"{name}.NAME"
        elif typing.get_origin(hint) is tuple:
            hint, name = typing.get_args(hint)[0], f"{name}[]"
        if dataclasses.is_dataclass(hint):
            lines += describe(hint, f"{name}.")
    return lines


def unknown_field(path: str, value: str, known: Iterable[str]) -> InputError:
    """The error about a field that does not exist; `value` is "=" and what it was given, or empty."""
    return InputError(f"{path}{value} is not possible: there is no such field, the nearest is {nearest(path, known)}.")


def find(table: Mapping[str, T], field: str, name: str) -> T:
    """An entry of a table.

    Args:
      table: name -> entry.
      field: that holds the name.
      name: in it.
    Raises:
      InputError: there is no such entry.
    """
    if name not in table:
        near = nearest(name, table)
        raise InputError(f"{field}={name!r} is not possible: there are {', '.join(table)}, and the nearest is {near}.")
    return table[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """The one of `known` that `name` was most likely meant to be: a dotted path is alike in whole and in its leaf."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        leaf = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + leaf

    return max(known, key=likeness)
