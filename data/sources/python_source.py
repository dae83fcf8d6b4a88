"""Text that every machine already has: the sources of the running Python's standard library."""

import functools
import platform
import sysconfig
import zlib
from pathlib import Path
from typing import Any

from gemma4_jax.data.sources import Source
from gemma4_jax.errors import InputError

MAX_CHARACTERS = 256
"""A document is as many whole lines as stay within this; a longer line is a document of its own."""

_NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}


def standard_library_files() -> list[Path]:
    """The .py files of the running Python's standard library, tests left out, sorted by path.

    Raises:
      InputError: if this Python carries no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if _NOT_STANDARD_LIBRARY.isdisjoint(path.relative_to(root).parts)]
    if not files:
        raise InputError(f"There are no .py files in {root}: use a Python that carries its sources.")
    return sorted(files)


def split_lines(text: str, max_characters: int) -> list[str]:
    """Cuts text between lines into pieces of at most `max_characters`, longer only where one line is."""
    pieces: list[list[str]] = []
    size = max_characters
    for line in text.splitlines(keepends=True):
        size += len(line)
        if size > max_characters:
            pieces.append([])
            size = len(line)
        pieces[-1].append(line)
    return ["".join(piece) for piece in pieces]


@functools.cache
def _pieces(is_train: bool) -> tuple[tuple[str, str], ...]:
    """(name, text) of every document on one side."""
    root = Path(sysconfig.get_paths()["stdlib"])
    named = []
    for path in standard_library_files():
        name = path.relative_to(root).as_posix()
        # The hash of its name decides, so a file stays on its side when others come and go.
        if (zlib.crc32(name.encode()) % 20 != 0) == is_train:
            pieces = split_lines(path.read_text("utf-8", errors="replace"), MAX_CHARACTERS)
            named += [(f"{name} part {i}", piece) for i, piece in enumerate(pieces)]
    return tuple(named)


class PythonSource(Source):
    """Standard-library sources, cut between lines into short documents; one file in twenty is held out.

    Args:
      split: "train" or "held_out".
    """

    def __init__(self, split: str) -> None:
        self._is_train = split == "train"

    def __len__(self) -> int:
        return len(_pieces(self._is_train))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": _pieces(self._is_train)[index][1]}

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "python", "python": platform.python_version(), "documents": len(self)}

    def name(self, index: int) -> str:
        return _pieces(self._is_train)[index][0]
