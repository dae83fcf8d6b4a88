"""Your own documents: one JSON object a line, with images in files beside it.

    {"segments": [{"image": "cat.png"}, {"text": "What is this? ", "loss": false}, {"text": "A cat.\\n"}]}
    {"text": "A document of text alone; short for one text segment."}

A text segment carries loss unless it says `"loss": false`. An image may bring its own budget: `"max_soft_tokens": 140`.
"""

import json
import os
from pathlib import Path
from typing import Any

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.errors import InputError

MAX_IMAGE_BYTES = 2**26
"""A larger image file is refused before it is read."""


class JsonlSource:
    """The documents of a JSON Lines file, in the order of its lines; blank lines are left out.

    Args:
      path: of the file. Image paths in it are relative to its folder and must stay inside it.
    Raises:
      InputError: if the file cannot be read; and on indexing, if a line or an image file of it cannot be.
    """

    OPTIONS = ()

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._folder = self._path.parent.resolve()
        self._lines: list[tuple[int, int, int]] = []  # (number, offset, length)
        try:
            with self._path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._lines.append((number, offset, len(line)))
                    offset += len(line)
        except OSError as error:
            raise InputError(f"The source 'jsonl:{path}' cannot be read: {error.strerror}.") from error

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Document:
        number, offset, length = self._lines[index]
        name = f"{self._path.name} line {number}"
        with self._path.open("rb") as file:
            file.seek(offset)
            line = file.read(length)
        try:
            return Document(self._segments(json.loads(line)), name)
        except (ValueError, RecursionError) as error:  # InputError, bad JSON and bad UTF-8 are all ValueErrors
            raise InputError(f"{name}: {error}") from error

    def _segments(self, record: Any) -> tuple[Text | Image, ...]:
        match record:
            case {"text": str(text)} if len(record) == 1:
                return (Text(text),)
            case {"segments": [_, *_] as segments} if len(record) == 1:
                return tuple(map(self._segment, segments))
        raise InputError('a line must be {"text": TEXT} or {"segments": [SEGMENT, ...]}, with nothing else.')

    def _segment(self, segment: Any) -> Text | Image:
        match segment:
            case {"text": str(text)} if segment.keys() <= {"text", "loss"}:
                loss = segment.get("loss", True)
                if isinstance(loss, bool):
                    return Text(text, loss)
            case {"image": str(path)} if segment.keys() <= {"image", "max_soft_tokens"}:
                return Image(self._read_image(path), segment.get("max_soft_tokens"))
        raise InputError(
            'a segment must be {"text": TEXT, "loss": true or false} or {"image": PATH, "max_soft_tokens": NUMBER}; '
            "loss and max_soft_tokens may be left out."
        )

    def _read_image(self, given: str) -> bytes:
        try:
            path = (self._folder / given).resolve()
            if not path.is_relative_to(self._folder):
                raise InputError(f"the image {given!r} lies outside the folder of the file: move it inside.")
            if not path.is_file() or os.path.getsize(path) > MAX_IMAGE_BYTES:
                raise InputError(f"the image {given!r} is not a file of at most {MAX_IMAGE_BYTES} bytes.")
            return path.read_bytes()
        except OSError as error:
            raise InputError(f"the image {given!r} cannot be read: {error.strerror}.") from error
