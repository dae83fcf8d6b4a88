"""Arrays that are written to an Orbax checkpoint while they are made, so that none is ever whole in memory."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

Index = tuple[slice, ...]

MAX_CHUNK_BYTES = 2**26
"""The most of an array that is made and written in one piece, and so read in one piece by an export."""

MAX_PENDING_BYTES = 2**29
"""The most that is on its way to the disk while more is made."""


class StreamedArray:
    """An array that is made piece by piece; a leaf of the tree that is saved.

    Args of the constructor:
      shape: may be ().
      dtype: of the pieces.
      read: gives the values at an index of one slice for each axis.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[Index], np.ndarray]) -> None:
        self.shape, self.dtype, self._read = shape, dtype, read

    def read_piece(self, index: Index) -> np.ndarray:
        """The values at one of `indices`."""
        return self._read(index)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The largest pieces of whole rows that are no larger than MAX_CHUNK_BYTES; of rows that are larger, pieces."""
        shape = list(self.shape)
        for axis, extent in enumerate(shape):
            num_bytes = math.prod(shape) * self.dtype.itemsize
            if num_bytes > MAX_CHUNK_BYTES:
                shape[axis] = max(1, extent * MAX_CHUNK_BYTES // num_bytes)
        return tuple(shape)

    def indices(self) -> Iterator[Index]:
        """The pieces, in order."""
        cuts = [
            [slice(start, min(start + size, extent)) for start in range(0, extent, size)]
            for extent, size in zip(self.shape, self.chunk_shape, strict=True)
        ]
        return itertools.product(*cuts)


def save_streamed(folder: Path, tree: dict[str, Any]) -> None:
    """Writes an Orbax checkpoint, uncompressed; it is read like any other.

    Args:
      folder: to make.
      tree: nested dictionaries of StreamedArray.
    Raises:
      OSError: it cannot be written.
    """
    handlers = (StreamedArray, _StreamingHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
    except ValueError as error:  # tensorstore's for whatever the file system refuses
        raise OSError(" ".join(str(error).split())[:200]) from error


class _StreamingHandler(ocp.type_handlers.NumpyHandler):
    """What Orbax does with numpy arrays, except for the writing, in one process."""

    async def serialize(
        self, values: Sequence[StreamedArray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        """Writes array after array; all is on the disk when it returns."""
        # All are created together: what is written at the same time needs one commit.
        opened = [_create(value, info) for value, info in zip(values, infos, strict=True)]
        pending: deque[tuple[int, Any]] = deque()
        pending_bytes = 0
        for value, array in zip(values, [await array for array in opened], strict=True):
            for index in value.indices():
                piece = value.read_piece(index)
                pending.append((piece.nbytes, array[index].write(piece, can_reference_source_data_indefinitely=True)))
                pending_bytes += piece.nbytes
                while pending_bytes > MAX_PENDING_BYTES:
                    num_bytes, written = pending.popleft()
                    await written
                    pending_bytes -= num_bytes
        for _, written in pending:
            await written
        return []


def _create(value: StreamedArray, info: Any) -> Any:
    """The future of an array in the place where Orbax's first process puts its own, to be merged by Orbax."""
    return tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{info.parent_dir}/ocdbt.process_0/",
                "path": f"{info.name}/",
            },
            "dtype": value.dtype.name,
            "metadata": {"shape": value.shape, "chunks": value.chunk_shape, "compressor": None},
            "store_data_equal_to_fill_value": True,
        },
        create=True,
        context=info.ts_context,
    )
