"""The safetensors file format: reading files that nobody vouches for, and writing them as a stream.

A file is the length of its header (8 bytes, little endian), a JSON header, and the bytes of all tensors without gaps.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import itertools
import json
import math
import mmap
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gemma4_jax.errors import InputError
from gemma4_jax.files import refuse_lfs_pointer
from gemma4_jax.hf.direct import write_through

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""The dtypes that are read and written, by their names in a header."""

MAX_HEADER_BYTES = 100_000_000
"""A longer header is refused before it is read; the reference library has the same limit."""

MAX_AXES = 8
"""No tensor of a model has more."""

_BLOCK_BYTES = 1 << 24
_STRIP = 16
_STRIP_SIZE = 1 << 18


class StoredTensor(NamedTuple):
    """A tensor as a file holds it.

    Attributes:
      dtype: key of `DTYPES`.
      shape: may be ().
      start, stop: its bytes, counted from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file, checked as a whole before any tensor is read, and mapped rather than loaded.

    Attributes:
      path: of the file.
      tensors: name -> where and what, in the order of their bytes.
      metadata: free text entries of the header.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Raises:
          InputError: the file cannot be read, or is not exactly what its header says.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, data_start = _read_header(file, size, path)
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
        self.metadata = header.pop("__metadata__", {})
        entries = {name: _parse_entry(path, name, entry, data_start) for name, entry in header.items()}
        self.tensors = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        end = data_start
        for name, tensor in self.tensors.items():
            if tensor.start != end:
                kind = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
                raise InputError(f"{path} is damaged: tensor {name:.100} {kind}.")
            end = tensor.stop
        if end != size:
            kind = "is cut short" if end > size else "goes on behind its last tensor"
            raise InputError(f"{path} {kind}: its header describes {end} bytes, and it has {size}.")

    def read(self, name: str) -> np.ndarray:
        """One tensor as a view of the mapped file: no bytes are read until they are used."""
        dtype, shape, start, _ = self.tensors[name]
        return np.frombuffer(self._mapped, DTYPES[dtype], math.prod(shape), start).reshape(shape)

    def release(self, name: str) -> None:
        """Gives the memory of a tensor's pages back; they are read again if they are used again."""
        tensor = self.tensors[name]
        start = -(-tensor.start // mmap.PAGESIZE) * mmap.PAGESIZE  # a shared first page stays with the tensor before
        if tensor.stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED, start, tensor.stop - start)


def _read_header(file: Any, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """(header, where data begins)."""
    refuse_lfs_pointer(path, file.read(64))
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{path} claims a header of {length} bytes: at most {MAX_HEADER_BYTES} are read.")
    if size < 8 + length:
        raise InputError(f"{path} is cut short: it has {size} bytes, and its header ends at {8 + length}.")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a header that is not JSON ({error}): it is damaged.") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path} has a header that is not of a safetensors file.")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """Checks one entry of a header as far as it can be checked alone."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    are_sizes = all(
        isinstance(numbers, list)
        and len(numbers) <= MAX_AXES
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        for numbers in (shape, offsets)
    )
    if not are_sizes or len(offsets) != 2 or not isinstance(dtype, str):
        raise InputError(f"{path} is damaged: the header says of tensor {name:.100} only {reprlib.repr(entry):.100}.")
    if dtype not in DTYPES:
        raise InputError(f"{path}: tensor {name:.100} has dtype {dtype:.20}, and only {', '.join(DTYPES)} are read.")
    size = DTYPES[dtype].itemsize
    for extent in shape:
        size *= extent
    if offsets[1] - offsets[0] != size:
        raise InputError(
            f"{path} is damaged: tensor {name:.100} of shape {shape} needs {size} bytes, and the header gives it "
            f"{offsets[1] - offsets[0]}."
        )
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


class OutgoingTensor(NamedTuple):
    """A tensor to be written.

    Attributes:
      name: in the file.
      dtype: key of `DTYPES`.
      shape: may be ().
      blocks: gives its values in order, as arrays of that dtype; called when its turn has come.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    @classmethod
    def copy_of(cls, file: "TensorFile", name: str) -> "OutgoingTensor":
        """A tensor of another file, bit for bit."""

        def blocks() -> Iterator[np.ndarray]:
            yield from in_blocks(file.read(name))
            file.release(name)

        stored = file.tensors[name]
        return cls(name, stored.dtype, stored.shape, blocks)

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in a file."""
        return self.size * DTYPES[self.dtype].itemsize


def write_tensor_file(path: Path, tensors: Sequence[OutgoingTensor], metadata: Mapping[str, str]) -> None:
    """Writes a new safetensors file, one block after another, to the disk.

    Args:
      path: must not exist.
      tensors: in the order in which their blocks are asked for; those of wide dtypes first keep all aligned.
      metadata: free text entries for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = memoryview(len(text).to_bytes(8, "little") + text)
    blocks = (block.reshape(-1).view(np.uint8).data for tensor in tensors for block in _checked_blocks(tensor))
    write_through(path, itertools.chain([head], blocks))


def _checked_blocks(tensor: OutgoingTensor) -> Iterator[np.ndarray]:
    written = 0
    for block in tensor.blocks():
        written += block.nbytes
        yield block
    assert written == tensor.num_bytes, tensor.name


def has_nan(array: np.ndarray) -> bool:
    """Whether there is NaN in a contiguous array; infinity is none."""
    values = array.reshape(-1)
    pieces = (values[start : start + _STRIP_SIZE] for start in range(0, values.size, _STRIP_SIZE))
    if array.dtype.itemsize == 2:  # numpy compares integers many at a time, and numbers of these types one by one
        infinity = array.dtype.type(np.inf).view(np.uint16)
        return any((piece.view(np.uint16) & 0x7FFF).max() > infinity for piece in pieces)
    return any(np.isnan(piece.max()) for piece in pieces)


def in_blocks(array: np.ndarray, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
    """An array in contiguous pieces along its first axis, each cast to dtype, so that no second copy of it exists."""
    dtype = array.dtype if dtype is None else dtype
    if array.ndim == 0:
        array = array.reshape(1)
    rows = max(1, _BLOCK_BYTES * len(array) // max(1, array.size * dtype.itemsize))
    for start in range(0, len(array), rows):
        piece = array[start : start + rows]
        if piece.dtype != dtype or not piece.flags.c_contiguous:
            piece, source = np.empty(piece.shape, dtype), piece
            copy_transposed(piece, source)
        yield piece


def copy_transposed(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, in strips narrow enough for the cache: several times faster where axes are exchanged."""
    if target.ndim == 0 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for start in range(0, target.shape[-1], _STRIP):
        strip = source[..., start : start + _STRIP]
        # Cast as it lies, for numpy casts slowly while it exchanges axes.
        target[..., start : start + _STRIP] = strip.astype(target.dtype, order="K", copy=False)
