"""Parameters by dotted path, read piece by piece: from a model in memory, or from a checkpoint that stays on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from jax.experimental import multihost_utils

from gemma4_jax.errors import InputError
from gemma4_jax.hf.names import flatten_paths


class Parameters(Protocol):
    """Where the values of a model are read from.

    Attributes:
      shapes: of every parameter and buffer, by dotted path.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def slab(self, path: str, row: int) -> tuple[int, np.ndarray]:
        """The rows along the first axis that are best read together with `row`: (the first of them, their values)."""


class StateParameters:
    """The values of an nnx.State. Where it is spread over processes, every process must ask for the same slabs.

    Args of the constructor:
      state: parameters and buffers of a model.
    """

    def __init__(self, state: nnx.State) -> None:
        self._leaves: dict[str, jax.Array] = flatten_paths(nnx.to_pure_dict(state))
        self.shapes: Mapping[str, tuple[int, ...]] = {path: leaf.shape for path, leaf in self._leaves.items()}

    def slab(self, path: str, row: int) -> tuple[int, np.ndarray]:
        """The whole array."""
        leaf = self._leaves[path]
        return 0, np.asarray(leaf) if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)


class CheckpointParameters:
    """The values in the last checkpoint of a run, of which no more than one slab is in memory at a time.

    Args of the constructor:
      run_dir: of the run.

    Attributes:
      folder: of the checkpoint's model.
    """

    def __init__(self, run_dir: Path) -> None:
        checkpoints = run_dir / "checkpoints"
        steps = ocp.utils.checkpoint_steps(checkpoints) if checkpoints.is_dir() else []
        if not steps:
            raise InputError(f"{run_dir} holds no checkpoint: train it first.")
        self.folder = (checkpoints / str(max(steps)) / "model").absolute()
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                metadata = checkpointer.metadata(self.folder).item_metadata
        except Exception as error:  # a damaged checkpoint meets the library with exceptions of every kind
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"checkpoint {self.folder.parent} cannot be read: {reason}.") from error
        if metadata is None:
            raise InputError(f"checkpoint {self.folder.parent} cannot be read: its list of arrays is missing.")
        self._leaves: dict[str, Any] = flatten_paths(metadata.tree)
        self.shapes: Mapping[str, tuple[int, ...]] = {path: leaf.shape for path, leaf in self._leaves.items()}
        self._held: tuple[str, int, np.ndarray] | None = None

    def slab(self, path: str, row: int) -> tuple[int, np.ndarray]:
        """As many rows as were written in one piece, and so are read and unpacked in one piece."""
        chunk = self._leaves[path].storage.chunk_shape
        rows = chunk[0] if chunk else 1
        start = row // rows * rows
        if self._held is None or self._held[:2] != (path, start):
            self._held = None  # before the next one is there
            kvstore = {"driver": "ocdbt", "base": f"file://{self.folder}/", "path": f"{path}/"}
            array = tensorstore.open({"driver": "auto", "kvstore": kvstore}, open=True, read=True).result()
            piece = array[start : start + rows] if chunk else array
            self._held = path, start, piece.read().result()
        return start, self._held[2]
