"""What `gemma4 prepare` writes, and a source of kind `prepared` reads: the files of a folder, and the form of a record.

A folder holds one source: manifest.json, and for each side of its split, `train` and `held_out`, shards of three files:

  text-00000-of-00016.arrayrecord  a record for each document, with its sizes, see `to_record`
  media-00000-of-00016.bin         patches of their images and features of their sounds, and nothing else
  done-00000-of-00016.json         what became of its documents, and the checksums of the other two; written last

Documents have the order of the source, and one that is unreadable has its place: so a run reads the same from both.
Patches and features are no records: ArrayRecord copies and hashes what it reads, which takes four to six times as long
as to read the patches of an image (benchmarks/data_prepared.py).
"""

import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.data.chat_templates import template_text
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.example import Example, SizedExample, SizedImage, SizedSound, StoredArray
from gemma4_jax.errors import InputError
from gemma4_jax.files import checksum

FORMAT = 2
"""Of the folder; a change of it, or of what an encoder makes of a document, counts it up."""

MANIFEST, PLAN = "manifest.json", "plan.json"

SIDES = ("train", "held_out")

FILES = ("text", "media")
"""Of a shard."""

MAX_MANIFEST_BYTES = 2**28
MAX_OPEN_FILES = 256
"""Of a process."""

MAX_RECORD_BYTES = 2**28
MAX_HEADER_BYTES = 2**22

_DTYPES = {"int32": np.dtype("<i4"), "bool": np.dtype("?")}
_LENGTH_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Shard:
    """Where the files of a shard are.

    Attributes:
      folder: of its side of the split.
      number, count: it is so many-th of so many, from 0.
    """

    folder: Path
    number: int
    count: int

    @property
    def text(self) -> Path:
        """The records of its documents."""
        return self._path("text", "arrayrecord")

    @property
    def media(self) -> Path:
        """What the towers read, in the order of the documents: of each its images, then its sounds."""
        return self._path("media", "bin")

    @property
    def done(self) -> Path:
        """What is known of the others; it is there once they are whole."""
        return self._path("done", "json")

    def files(self) -> dict[str, Path]:
        """Those that hold data, by `FILES`."""
        return {name: getattr(self, name) for name in FILES}

    def _path(self, what: str, suffix: str) -> Path:
        return self.folder / f"{what}-{self.number:05}-of-{self.count:05}.{suffix}"


def to_record(example: SizedExample, places: Sequence[tuple[int, str]]) -> bytes:
    """A document as a record: the length of its header, the header in JSON, and its arrays one after another.

    Args:
      example: with images and sounds that are in no prepared file yet.
      places: of each image, then of each sound (offset in their file, why it is damaged or ""), see `StoredArray`.
    Raises:
      InputError: it is larger than what is read.
    """
    text = example.text
    stored = [
        [medium.name, offset, medium.num_bytes, damage]
        for medium, (offset, damage) in zip(example.media, places, strict=True)
    ]
    images = [
        [*fields, image.height, image.width, image.max_soft_tokens, image.may_be_missing]
        for image, fields in zip(example.images, stored, strict=False)
    ]
    sounds = [[*fields, sound.num_frames] for sound, fields in zip(example.sounds, stored[len(images) :], strict=True)]
    arrays = [text.tokens, text.carries_loss]
    header = {
        "name": text.name,
        "context": text.context,
        "images_missing": text.images_missing,
        "images": images,
        "sounds": sounds,
        "arrays": [[array.dtype.name, *array.shape] for array in arrays],
    }
    record = _record(header, *(array.astype(_DTYPES[array.dtype.name], copy=False).tobytes() for array in arrays))
    if len(record) > MAX_RECORD_BYTES:
        raise InputError(f"{text.name}: a record of {len(record)} bytes is refused: at most {MAX_RECORD_BYTES} are.")
    return record


def unreadable_record(reason: str) -> bytes:
    """The record of a document that cannot be read, for this reason."""
    return _record({"unreadable": reason[: MAX_HEADER_BYTES // 8]})


def from_record(record: bytes, media: Path, encoding: Mapping[str, Any]) -> SizedExample:
    """What `to_record` wrote; nobody vouches for the record, and `Encoder` looks at its tokens.

    Args:
      record: bytes.
      media: the file with what the towers read of it.
      encoding: of the folder.
    Raises:
      InputError: it is damaged, or of a document that cannot be read.
    """
    try:
        start = _LENGTH_BYTES + int.from_bytes(record[:_LENGTH_BYTES], "little")
        if not _LENGTH_BYTES < start <= len(record) <= MAX_RECORD_BYTES or start > MAX_HEADER_BYTES:
            raise ValueError("it has another length")
        header = json.loads(record[_LENGTH_BYTES:start])
        if "unreadable" in header:
            raise InputError(str(header["unreadable"]))
        tokens, carries_loss = _arrays(record, start, header["arrays"])
        if tokens.dtype != np.int32 or carries_loss.dtype != np.bool_ or tokens.ndim != 1:
            raise ValueError("it begins with other arrays")
        if tokens.shape != carries_loss.shape:
            raise ValueError("its arrays have other shapes")
        name, numbers = str(header["name"]), [_count(header[field]) for field in ("context", "images_missing")]
        text = Example(tokens, carries_loss, (), name, (), "", *numbers)
        images = tuple(_image(fields, media, encoding) for fields in header["images"])
        sounds = tuple(_sound(fields, media, encoding) for fields in header["sounds"])
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"its record is damaged ({error}): prepare it again.") from error
    return SizedExample(text, images, sounds=sounds)


def _record(header: Mapping[str, Any], *arrays: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    if len(encoded) > MAX_HEADER_BYTES - _LENGTH_BYTES:
        raise InputError(f"{header.get('name')!s:.100}: its names are too long, {len(encoded)} bytes in all.")
    return b"".join([len(encoded).to_bytes(_LENGTH_BYTES, "little"), encoded, *arrays])


def _arrays(record: bytes, start: int, kinds: Sequence[Sequence[Any]]) -> list[np.ndarray]:
    arrays = []
    for dtype, *shape in kinds:
        count = 1
        for side in map(_count, shape):
            count *= side
        stop = start + count * _DTYPES[dtype].itemsize
        if stop > len(record):
            raise ValueError("it ends within an array")
        arrays.append(np.frombuffer(record, _DTYPES[dtype], count, start).reshape(shape))
        start = stop
    if start != len(record):
        raise ValueError("it goes on behind its arrays")
    return arrays


def _image(fields: Sequence[Any], media: Path, encoding: Mapping[str, Any]) -> SizedImage:
    name, offset, num_bytes, damage, height, width, budget, may_be_missing = fields
    stored = StoredArray(media, _count(offset), _count(num_bytes), str(damage))
    cells = encoding["patch_size"], encoding["pooling_size"]
    return SizedImage(stored, _count(height), _count(width), *cells, _count(budget), str(name), bool(may_be_missing))


def _sound(fields: Sequence[Any], media: Path, encoding: Mapping[str, Any]) -> SizedSound:
    name, offset, num_bytes, damage, num_frames = fields
    stored = StoredArray(media, _count(offset), _count(num_bytes), str(damage))
    return SizedSound(stored, _count(num_frames), _count(encoding["mel_bins"]), name=str(name))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{value!r:.20} is no count")
    return value


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is known of prepared data: the plan by which it was made, and "shards", in order.

    Args:
      folder: nobody vouches for what is in it.
    Raises:
      InputError: it is not prepared, not wholly, or its manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("it is too large")
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise InputError(
                f"{folder} was prepared by another version of this package: prepare it again, or read it with that."
            )
        encoding = manifest["encoding"]
        if type(encoding["tokenizer"]) is not str or type(encoding["soft_tokens_per_image"]) is not int:
            raise ValueError("it says nothing of a tokenizer")
        _ = [_count(encoding[name]) for name in _OF_MODEL if encoding[name] is not None]
        for shard in manifest["shards"]:
            files = [shard["files"][name] for name in FILES]
            _ = _count(shard["documents"]), [(_count(file["bytes"]), _count(file["crc32"])) for file in files]
            if shard["side"] not in SIDES:
                raise ValueError(f"it has a side {shard['side']!r:.20}")
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no {MANIFEST}: give the folder of a source that was prepared, or end its preparation by "
            "`gemma4 prepare`."
        ) from error
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): run `gemma4 prepare` again.") from error
    return manifest


def shards_in(folder: Path, manifest: Mapping[str, Any]) -> list[tuple[Shard, Mapping[str, Any]]]:
    """Every shard, in order, and what was written of it when it was done."""
    found = []
    for side in SIDES:
        known = [shard for shard in manifest["shards"] if shard["side"] == side]
        found += [(Shard(folder / side, i, len(known)), shard) for i, shard in enumerate(known)]
    return found


def damage(shard: Shard, known: Mapping[str, Any], *, by_checksum: bool = False) -> str | None:
    """What is wrong with the files of a shard, as a clause about one; None if nothing is.

    Args:
      shard: whose files they are.
      known: what was written of it when it was done.
      by_checksum: whether to read them; else only sizes are compared.
    """
    for name, path in shard.files().items():
        written = known["files"][name]
        try:
            size = path.stat().st_size
            if size != written["bytes"]:
                return f"{path} is damaged, {size:,} bytes of {written['bytes']:,}"
            if by_checksum and checksum(path) != written["crc32"]:
                return f"{path} is damaged, its bytes are not those that were written"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


@functools.lru_cache(MAX_OPEN_FILES)
def open_reader(path: Path) -> Any:
    """A reader of an ArrayRecord file for random access, which all threads of this process share.

    Raises:
      InputError: array_record is not installed, or the file is damaged.
    """
    reader = array_record().ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        raise InputError(f"{path} is damaged: run `gemma4 prepare` again.")
    return reader


def array_record() -> Any:
    """The module of its reader and its writer.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise InputError(
            "Prepared data needs array_record, which has no wheel for every platform: install it."
        ) from error


def encoding_of(encode: Encoder) -> dict[str, Any]:
    """What decides, beside the documents, what an encoder makes of them: a JSON object."""
    tokenizer, vision, audio = encode.tokenizer, encode.vision, encode.audio
    digest = hashlib.blake2b(tokenizer.path.read_bytes(), digest_size=16)
    digest.update(template_text(tokenizer).encode("utf-8", "surrogatepass"))
    return {
        "tokenizer": digest.hexdigest(),
        "patch_size": vision.patch_size if vision else None,
        "pooling_size": vision.pooling_size if vision else None,
        "soft_tokens_per_image": encode.max_soft_tokens,
        "mel_bins": audio.num_mel_bins if audio else None,
    }


def check_encoding(encoding: Mapping[str, Any], encode: Encoder, section: str) -> None:
    """Refuses prepared data that is not for this tokenizer and this model.

    Args:
      encoding: of its folder.
      encode: of the run.
      section: of the config that names it.
    Raises:
      InputError: it was prepared with something else.
    """
    here = encoding_of(encode)
    if encoding["tokenizer"] != here["tokenizer"]:
        raise InputError(
            f"{section} was prepared with another tokenizer, or chat template, than {str(encode.tokenizer.path)!r}: "
            "prepare it again with this one."
        )
    for name, what in _OF_MODEL.items():
        if encoding[name] != here[name]:
            raise InputError(
                f"{section} was prepared with {name}={encoding[name]}, {what}, and this model has {here[name]}: "
                "prepare it again for it."
            )
    if encoding["soft_tokens_per_image"] > here["soft_tokens_per_image"]:
        raise InputError(
            f"{section} was prepared with data.soft_tokens_per_image={encoding['soft_tokens_per_image']}, and this run "
            f"has {here['soft_tokens_per_image']}: give it as many, or prepare it again."
        )


_OF_MODEL = {
    "patch_size": "the side of a patch",
    "pooling_size": "the side of a soft token in patches",
    "mel_bins": "the numbers of a frame of sound",
}
"""Field of an encoding -> what it is."""
