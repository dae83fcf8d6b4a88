"""Your own documents: one JSON object a line, or an array of them, with images in files beside it.

    {"segments": [{"image": "cat.png"}, {"text": "What is this? ", "loss": false}, {"text": "A cat.\\n"}]}
    {"text": "A document of text alone; short for one text segment."}

A text segment carries loss unless it says `"loss": false`. An image may bring its own budget: `"max_soft_tokens": 140`.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.sources.records import file_fingerprint, find_records, read_record
from gemma4_jax.errors import InputError

MAX_IMAGE_BYTES = 2**26
"""A larger image file is refused before it is read."""

MAX_SEGMENTS, MAX_IMAGES, MAX_IMAGES_BYTES = 4096, 256, 2**28
"""Of a document; the bytes are those of all its image files."""


class JsonlSource:
    """The documents of a JSON Lines file, in the order of its lines; blank lines are left out.

    Args:
      path: of the file, which may also hold one JSON array. Image paths in it are relative to its folder and must stay
        inside it.
    Raises:
      InputError: if the file cannot be read; and on indexing, if a record or an image file of it cannot be.
    """

    OPTIONS = ()

    def __init__(self, path: str) -> None:
        self._path = Path(os.path.expanduser(path))
        self._folder = Path(os.path.realpath(self._path.parent))
        self._unit, self._records = find_records(self._path, f"jsonl:{path}")

    def __len__(self) -> int:
        return len(self._records)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "jsonl", "documents": len(self), **file_fingerprint(self._path)}

    def __getitem__(self, index: int) -> Document:
        record = self._records[index]
        name = f"{self._path.name} {self._unit} {record.number}"
        try:
            with self._path.open("rb") as file:
                line = read_record(file, record)
            return Document(self._segments(json.loads(line)), name)
        except OSError as error:
            raise InputError(f"{name}: the file cannot be read: {error.strerror}.") from error
        except RecursionError as error:
            raise InputError(f"{name}: its JSON is nested too deeply.") from error
        except ValueError as error:  # InputError, bad JSON and bad UTF-8
            raise InputError(f"{name}: {error}") from error

    def _segments(self, record: Any) -> tuple[Text | Image, ...]:
        match record:
            case {"text": str(text)} if len(record) == 1:
                return (Text(text),)
            case {"segments": [_, *_] as segments} if len(record) == 1:
                num_images = sum(isinstance(segment, dict) and "image" in segment for segment in segments)
                if len(segments) > MAX_SEGMENTS or num_images > MAX_IMAGES:
                    given = f"{len(segments)} segments with {num_images} images are"
                    raise InputError(f"{given} refused: a document may have {MAX_SEGMENTS}, and {MAX_IMAGES} images.")
                parts: list[Text | Image] = []
                left = MAX_IMAGES_BYTES
                for segment in segments:
                    parts.append(part := self._segment(segment))
                    left -= len(part.content) if isinstance(part, Image) and isinstance(part.content, bytes) else 0
                    if left < 0:
                        raise InputError(f"its images have more than the {MAX_IMAGES_BYTES} bytes that are read.")
                return tuple(parts)
        raise InputError('a line must be {"text": TEXT} or {"segments": [SEGMENT, ...]}, with nothing else.')

    def _segment(self, segment: Any) -> Text | Image:
        match segment:
            case {"text": str(text)} if segment.keys() <= {"text", "loss"}:
                loss = segment.get("loss", True)
                if isinstance(loss, bool):
                    return Text(text, loss)
            case {"image": str(path)} if segment.keys() <= {"image", "max_soft_tokens"}:
                return Image(self._read_image(path), segment.get("max_soft_tokens"), path)
        raise InputError(
            'a segment must be {"text": TEXT, "loss": true or false} or {"image": PATH, "max_soft_tokens": NUMBER}; '
            "loss and max_soft_tokens may be left out."
        )

    def _read_image(self, given: str) -> bytes:
        try:
            return self._path_of(given).read_bytes()
        except OSError as error:
            raise InputError(f"the image {given!r:.100} cannot be read: {error.strerror}.") from error

    def _path_of(self, given: str) -> Path:
        """The file that a record names as an image, once it is known to be one that may be read."""
        image = f"the image {given!r:.100}"
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", given):
            raise InputError(f"{image} is a URL: save it as a file beside this one, and name that file.")
        path = Path(os.path.realpath(self._folder / given))
        if not path.is_relative_to(self._folder):
            raise InputError(f"{image} lies outside the folder of the file: move it inside.")
        if path.is_symlink():  # even now: realpath has followed every link that leads anywhere
            raise InputError(f"{image} is a link that leads back to itself: give the file itself.")
        if not path.exists():
            raise InputError(f"{image} is missing: put it into {self._folder}, or mend its path.")
        if not path.is_file():
            raise InputError(f"{image} is not a file: give the path of one.")
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            raise InputError(f"{image} has {size} bytes, and at most {MAX_IMAGE_BYTES} are read: make it smaller.")
        return path
