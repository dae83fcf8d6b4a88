"""`gemma4`: one command for everything.

Each command is a module of this folder with `main(arguments)` and `help_text()`, imported when it is asked for.
"""

import contextlib
import errno
import importlib
import io
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from gemma4_jax.errors import InputError

COMMANDS = {
    "train": "train the run that a config describes, or resume it",
    "fields": "tell every field of a run config, its default and its meaning",
    "preview": "show the first packed rows of a run as one HTML page",
    "prepare": "encode the data of a run once, so that training only reads it",
    "export": "write a trained run as Hugging Face-format safetensors",
    "convert": "write Hugging Face-format safetensors as a checkpoint that runs begin from",
    "check": "compare the checkpoints of a run with their checksums",
    "generate": "let a model in Hugging Face format write after a prompt",
}
"""Command -> what it does. Its module is gemma4_jax.launch.COMMAND."""

USAGE = "\n".join(
    [
        "gemma4 COMMAND [arguments]: train Gemma 4, text and images, in JAX.",
        "",
        *(f"  gemma4 {name:<10}{what}" for name, what in COMMANDS.items()),
        "",
        "gemma4 COMMAND --help explains a command. To begin: gemma4 train --config=quickstart",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: the command line without the program's name; sys.argv's by default.
    Returns:
      Exit status: 0; 2 where the input is not acceptable, with one sentence on stderr that says why; 130 where the
      user interrupted it.
    Raises:
      SystemExit: 143, on SIGTERM; 130, where a run that the user interrupted was saved.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show must not end a run: it is escaped
            stream.reconfigure(errors="backslashreplace")
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(version("gemma4-jax"))
        return 0
    try:
        if command not in COMMANDS:
            raise InputError(f"{command!r} is not a command: there are {', '.join(COMMANDS)}.")
        module = importlib.import_module(f"gemma4_jax.launch.{command}")
        if any(argument in ("--help", "-h") for argument in rest):
            print(module.help_text())
        else:
            with _exit_on_sigterm(), _warnings_in_one_line():
                module.main(rest)
    except InputError as error:
        print(f"gemma4: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"gemma4: {error.filename or 'a file'} cannot be written: the disk is full, make room.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gemma4: interrupted.", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Shows what is warned of like an error: where in the code it was written is of no use to who reads it."""
    shown = warnings.showwarning

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"gemma4: {message}", file=sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM an exception, so that what a command has begun to write is removed; a run answers by itself."""

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    jax = sys.modules.get("jax")
    belongs_to_jax = jax is not None and jax.distributed.is_initialized()
    if belongs_to_jax or threading.current_thread() is not threading.main_thread():  # no other one may set a handler
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
