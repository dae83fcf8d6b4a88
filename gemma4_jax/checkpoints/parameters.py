"""Parameters by dotted path, read piece by piece: from a model in memory, or from a checkpoint that stays on disk."""

import itertools
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from jax.experimental import multihost_utils

from gemma4_jax.checkpoints.integrity import FROZEN, newest_intact
from gemma4_jax.errors import InputError
from gemma4_jax.processes import wait_for_first

_SLAB_BYTES = 1 << 27


class Parameters(Protocol):
    """Where the values of a model are read from.

    Attributes:
      shapes: of every parameter and buffer, by dotted path.
      dtypes: of every parameter and buffer, by dotted path.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]

    def slab(self, path: str, row: int) -> tuple[int, np.ndarray]:
        """The rows along the first axis that are best read together with `row`: (the first of them, their values)."""


class StateParameters:
    """The values of an nnx.State, of which one slab is on the host at a time. Where it is spread over processes, every
    process must ask for the same slabs in the same order.

    Args of the constructor:
      state: parameters and buffers of a model.
    """

    def __init__(self, state: nnx.State) -> None:
        self._leaves: dict[str, jax.Array] = flatten_paths(nnx.to_pure_dict(state))
        self.shapes: Mapping[str, tuple[int, ...]] = {path: leaf.shape for path, leaf in self._leaves.items()}
        self.dtypes: Mapping[str, np.dtype] = {path: np.dtype(leaf.dtype) for path, leaf in self._leaves.items()}
        self._held: tuple[str, int, np.ndarray] | None = None

    def slab(self, path: str, row: int) -> tuple[int, np.ndarray]:
        """As many rows as fit in _SLAB_BYTES; all, where rows are spread over devices, for it takes all to read one."""
        leaf = self._leaves[path]
        rows = total = (leaf.shape or (1,))[0]
        if leaf.sharding.shard_shape(leaf.shape)[:1] == leaf.shape[:1]:
            rows = min(total, max(1, _SLAB_BYTES * total // max(1, leaf.nbytes)))
        start = row // rows * rows
        if self._held is None or self._held[:2] != (path, start):
            self._held = None  # before the next one is there
            part = leaf if rows == total else _take_rows(leaf, start, min(rows, total - start))
            self._held = path, start, _to_host(part)
        return start, self._held[2]


@partial(jax.jit, static_argnames="rows")
def _take_rows(array: jax.Array, start: int, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, rows)


def _to_host(array: jax.Array) -> np.ndarray:
    """The values of an array, which does not keep them as np.asarray(array) would have it do."""
    if not array.is_fully_addressable:
        wait_for_first()
        return multihost_utils.process_allgather(array, tiled=True)
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


def flatten_paths(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, such as an nnx.State, to {dotted path: leaf}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten_paths(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def stored_arrays(folder: Path) -> dict[str, Any]:
    """What Orbax tells of every array in an item of a checkpoint, by dotted path: shape, dtype, storage.

    Args:
      folder: RUN_DIR/checkpoints/STEP/ITEM.
    Raises:
      InputError: it tells nothing.
    """
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
        reason = "its list of arrays is missing"
    except Exception as error:  # a damaged checkpoint meets the library with exceptions of every kind
        metadata, reason = None, " ".join(str(error).split())[:200]
    if metadata is None:
        raise InputError(
            f"checkpoint {folder.parent} cannot be read: {reason}; delete that folder to go on from the one before it."
        )
    return flatten_paths(metadata.tree)


class CheckpointParameters:
    """The values in the newest intact checkpoint of a run, of which no more than two slabs are in memory at a time: the
    one that was asked for, and the one that follows it, which is read and unpacked meanwhile.

    Args of the constructor:
      run_dir: of the run.
      step: of its newest intact checkpoint; None is to look for that one.

    Attributes:
      folder: of the checkpoint's model.
      folders: where each array is: there, or in what all checkpoints of the run share.
    """

    def __init__(self, run_dir: Path, step: int | None = None) -> None:
        step = newest_intact(run_dir) if step is None else step
        self.folder = (run_dir / "checkpoints" / str(step) / "model").absolute()
        self._leaves: dict[str, Any] = {}
        self.folders: dict[str, Path] = {}
        shared = (run_dir / FROZEN / "model").absolute()
        for folder in (shared, self.folder) if shared.exists() else (self.folder,):
            leaves = stored_arrays(folder)
            self._leaves |= leaves
            self.folders |= dict.fromkeys(leaves, folder)
        self.shapes: Mapping[str, tuple[int, ...]] = {path: leaf.shape for path, leaf in self._leaves.items()}
        self.dtypes: Mapping[str, np.dtype] = {path: np.dtype(leaf.dtype) for path, leaf in self._leaves.items()}
        # An export goes through the arrays in the order of their paths.
        self._following = dict(itertools.pairwise(sorted(self.shapes)))
        self._held: tuple[str, int, np.ndarray] | None = None
        self._coming: tuple[str, int, Any] | None = None

    def slab(self, path: str, row: int) -> tuple[int, np.ndarray]:
        """As many rows as fit in _SLAB_BYTES of those that were written in one piece, and are unpacked in one piece."""
        rows = self._rows(path)
        start = row // rows * rows
        if self._held is None or self._held[:2] != (path, start):
            if self._coming is None or self._coming[:2] != (path, start):
                self._coming = self._begin_to_read(path, start)
            self._held = None  # before the next one is there
            try:
                self._held = path, start, self._coming[2].result()
            except ValueError as error:  # tensorstore's for whatever is wrong with a file
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"checkpoint {self.folder.parent} cannot be read: {reason}.") from error
            is_last = start + rows >= (self.shapes[path] or (1,))[0]
            next_path = self._following.get(path) if is_last else path
            next_row = 0 if is_last else start + rows
            self._coming = None if next_path is None else self._begin_to_read(next_path, next_row)
        return start, self._held[2]

    def _rows(self, path: str) -> int:
        """Rows of a slab; of an array without axes, one."""
        chunk, shape = self._leaves[path].storage.chunk_shape, self.shapes[path]
        if not shape:
            return 1
        num_bytes = chunk[0] * math.prod(shape[1:]) * self.dtypes[path].itemsize
        return chunk[0] * max(1, _SLAB_BYTES // max(1, num_bytes))

    def _begin_to_read(self, path: str, start: int) -> tuple[str, int, Any]:
        """(path, start, the future of the slab there)."""
        # Mapped, for read into memory that is new each time it takes three times as long.
        base = {"driver": "file", "path": f"{self.folders[path]}/", "file_io_mode": {"mode": "memmap"}}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
        array = tensorstore.open({"driver": "auto", "kvstore": kvstore}, open=True, read=True).result()
        if array.ndim:
            array = array[start : min(start + self._rows(path), array.shape[0])]
        return path, start, array.read()
