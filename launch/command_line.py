"""The door: from a command line to a RunConfig. Nothing here imports jax."""

import ast
import inspect
import re
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from gemma4_jax import configs
from gemma4_jax.errors import InputError
from gemma4_jax.fields import accepted_type, leaf_names, nearest, unknown_field
from gemma4_jax.files import local_path
from gemma4_jax.run_config import RunConfig


def from_command_line(arguments: Sequence[str], command_flags: flags.FlagValues | None = None) -> RunConfig:
    """The run config that a command line asks for.

    Args:
      arguments: `--config=FILE_OR_NAME` or `--config=FILE_OR_NAME:ARGUMENT`, any number of `--config.FIELD=VALUE`,
        and flags of the command.
      command_flags: flags of the command beside the config; parsed in place.
    Raises:
      InputError: anything at all is wrong with it.
    """
    values = flags.FlagValues() if command_flags is None else command_flags
    given, rest = _take_config(arguments)
    _check_flags(rest, values)
    if not given:
        raise InputError(f"--config is needed: a .py file, or one of the shipped {', '.join(shipped())}.")
    config = load(*find(given))
    _check_overrides(rest, config)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["gemma4", *rest])
        positional = values(["gemma4", *rest])[1:]
    except flags.Error as error:
        raise InputError(_flag_sentence(error)) from error
    if positional:
        raise InputError(f"{positional[0]!r} is not expected here: give fields as --config.FIELD=VALUE.")
    return RunConfig.from_dict(config.to_dict())


def shipped() -> dict[str, Path]:
    """Name -> file of every config in this package."""
    folder = Path(configs.__path__[0])
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def shipped_listing() -> str:
    """The shipped configs, a line each, for help texts."""
    lines = ["Shipped configs:"]
    for name, file in shipped().items():
        summary = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        lines.append(f"  {name:<18}{summary}")
    return "\n".join(lines)


def find(given: str) -> tuple[Path, str | None]:
    """The file that `--config=given` means, and the argument for its get_config().

    Args:
      given: a path or the bare name of a shipped config, and behind a colon an argument, if it is to have one.
    Returns:
      (the file, the argument or None).
    Raises:
      InputError: there is no such file.
    """
    # A path may have colons of its own.
    match = re.fullmatch(r"(.*?\.py|[^:]*)(?::(.*))?", given, re.DOTALL)
    name, argument = match.groups() if match else (given, None)
    if name in shipped():
        return shipped()[name], argument
    path = local_path(name)
    if path.suffix != ".py":
        near = nearest(path.stem, shipped())
        raise InputError(
            f"--config={given} is neither a .py file nor a shipped config: "
            f"shipped are {', '.join(shipped())}, and the nearest is {near}."
        )
    return path, argument


def load(path: Path, argument: str | None = None) -> ConfigDict:
    """Runs a config file and calls its get_config(), with the argument if there is one.

    Raises:
      InputError: the file is missing or unreadable, fails, takes no such argument, or gives no ConfigDict.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"config file {path} cannot be read: {(error.strerror or 'unknown error').lower()}."
        ) from error
    namespace: dict[str, Any] = {"__name__": "run_config_file", "__file__": str(path)}
    given = () if argument is None else (argument,)
    try:
        exec(compile(source, str(path), "exec"), namespace)
        get_config = namespace.get("get_config")
        if callable(get_config):
            _check_argument(path, get_config, given)
        config = get_config(*given) if callable(get_config) else None
    except InputError:
        raise
    except Exception as error:
        raise InputError(_file_sentence(path, error)) from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"config file {path} must define a function get_config() that returns an ml_collections ConfigDict."
        )
    return config.lock()


def _check_argument(path: Path, get_config: Callable[..., Any], given: tuple[str, ...]) -> None:
    """Refuses an argument that get_config() does not take, and the lack of one that it needs."""
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError:
        mistake = (
            f"takes no argument: leave out :{given[0]} behind its name"
            if given
            else f"needs an argument: give it behind a colon, {path.name}:ARGUMENT"
        )
        raise InputError(f"config file {path} {mistake}.") from None


def _file_sentence(path: Path, error: Exception) -> str:
    """What went wrong in a config file, and on which of its lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines, text = [error.lineno], error.msg
    else:
        text = " ".join(str(error).split())
    missing = re.search(r'Key "(\w+)" does not exist', text)
    if missing:
        near = nearest(missing[1], leaf_names(RunConfig))
        text = f"there is no field {missing[1]}, the nearest is {near}"
    where = f", line {lines[-1]}" if lines else ""
    return f"config file {path}{where}: {type(error).__name__}: {textwrap.shorten(text, 200).rstrip('.')}."


def _take_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Splits off the value of --config: ("" if there is none, the other arguments); the last one counts."""
    given, rest, remaining = "", [], iter(arguments)
    for argument in remaining:
        if argument in ("--config", "-config"):
            given = next(remaining, "")
        elif match := re.fullmatch(r"--?config=(.*)", argument, re.DOTALL):
            given = match[1]
        else:
            rest.append(argument)
    return given, rest


def _check_flags(arguments: Sequence[str], command_flags: flags.FlagValues) -> None:
    """Refuses flags that are neither fields of the config nor flags of the command."""
    for argument in arguments:
        match = re.match(r"--?([A-Za-z][^=]*)", argument)
        if match and not re.match(r"(no)?config\.", match[1]) and match[1] not in command_flags:
            near = nearest(match[1].partition(".")[0], ["config", *command_flags])
            raise InputError(f"{argument} is not possible: there is no such flag, the nearest is --{near}.")


def _check_overrides(arguments: Sequence[str], config: ConfigDict) -> None:
    """Refuses fields that do not exist, while what they were given is still at hand."""
    known = _values(config.to_dict())
    for argument in arguments:
        match = re.fullmatch(r"--?(?:no)?config\.([^=]*)(=.*)?", argument, re.DOTALL)
        if match is None:
            continue
        path, value = match[1], match[2] or ""
        section, _, name = path.rpartition(".")
        if path not in known and isinstance(known.get(section), Mapping) and section in _FREE:
            raise InputError(
                f"{path}{value} is not possible: {section} has no {name!r} to change, so give all of it, "
                f'--config.{section}="{{{name!r}: {{...}}}}".'
            )
        if path not in known:
            raise unknown_field(path, value, [*known, *leaf_names(RunConfig)])
        if path in _FREE:
            _check_names(path, value[1:])
        if known[path] is None:
            raise InputError(f"{path}{value} is not possible: it is None here, and only a config file can set it.")


def _check_names(path: str, value: str) -> None:
    """Refuses a dictionary in which a name comes twice, of which Python would silently take the last."""
    try:
        parts = list(ast.walk(ast.parse(value, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # which its flag says
        return
    for part in parts:
        names = [key.value for key in part.keys if isinstance(key, ast.Constant)] if isinstance(part, ast.Dict) else []
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"--config.{path} names {twice!r} twice: give each a name of its own.")


_FREE = ("data.sources", "evaluators")
"""Sections whose names are the user's."""


def _values(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {dotted path: value}, sections among them."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat[f"{prefix}{name}"] = value
        if isinstance(value, Mapping):
            flat |= _values(value, f"{prefix}{name}.")
    return flat


def _flag_sentence(error: flags.Error) -> str:
    """absl's error about a flag in our words, where it is about the value of a field."""
    text = " ".join(str(error).split())
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
    if match is None:
        return text.rstrip(" ?.") + "."
    return f"{match[1]}={match[2]!r} is not possible: it must be {accepted_type(RunConfig, match[1])}."
