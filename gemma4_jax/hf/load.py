"""Import: a Hugging Face folder straight into the sharded arrays of a mesh.

Everything that can be checked without reading weights is checked before any is read. Files are mapped, and each
device's shard is put together from the slices of the tensors that make it up: no process holds more than its own
shards and one tensor.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from gemma4_jax.checkpoints.parameters import flatten_paths
from gemma4_jax.config import Gemma4Config
from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path, refuse_lfs_pointer
from gemma4_jax.hf.config import from_hf, is_text_only
from gemma4_jax.hf.leftovers import beside
from gemma4_jax.hf.names import (
    EMBEDDING,
    HEAD,
    Tensor,
    abbreviate,
    full_name,
    tensors,
    text_only_name,
)
from gemma4_jax.hf.safetensors import (
    DTYPES,
    OutgoingTensor,
    TensorFile,
    copy_transposed,
    has_nan,
    in_blocks,
    write_tensor_file,
)
from gemma4_jax.tokenizer import Tokenizer

_MAX_JSON_BYTES = 1 << 26
_ALIGNMENT = 64
_MAPPED_BYTES = 1 << 28
"""About how much of a tensor is read before the memory of its file's pages is given back."""


class Checkpoint:
    """A folder with config.json and one or more safetensors files, all of it checked except the values.

    Attributes:
      folder: where it is.
      config: the architecture that its config.json describes.
      hf_config: the content of config.json.
      files: name of a tensor -> the file that holds it. Those of a checkpoint of the decoder alone have the names that
        they have in a whole one.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens a checkpoint.

        Raises:
          InputError: anything at all is wrong with it. One message names every tensor that is missing, unexpected or
            of another shape.
        """
        self.folder = local_path(folder)
        self.hf_config: dict[str, Any] = read_json(self.folder / "config.json")
        tokenizer = _tokenizer(self.folder)
        self.config: Gemma4Config = from_hf(self.hf_config, None if tokenizer is None else tokenizer.tokens)
        self.files: dict[str, TensorFile] = _open_files(self.folder)
        named: Callable[[str], str] = str
        if is_text_only(self.hf_config):
            self.files, named = _with_full_names(self.files), text_only_name
        _drop_tied_head(self.folder, self.files)
        _check_tensors(self.folder, self.files, tensors(self.config), named)
        if tokenizer is not None and tokenizer.vocab_size > self.config.text.vocab_size:
            raise InputError(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens, and the embedding of the model "
                f"{self.config.text.vocab_size}."
            )

    def num_bytes(self, names: Iterable[str]) -> int:
        """Of some of its tensors."""
        stored = [self.files[name].tensors[name] for name in names]
        return sum(tensor.stop - tensor.start for tensor in stored)

    def unused(self, state: nnx.State) -> list[str]:
        """Names of tensors that a model with this (abstract) state has no use for: K and V of KV-shared layers, and
        towers that it leaves out."""
        paths = flatten_paths(nnx.to_pure_dict(state))
        table = {tensor.name: tensor.path for tensor in tensors(self.config)}
        return [name for name in self.files if table[name] not in paths]


class ParameterReader:
    """Parts of parameters, put together from the slices of the tensors that make them up.

    Args of the constructor:
      checkpoint: where the tensors are.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stacks: dict[str, list[Tensor]] = {}
        for tensor in tensors(checkpoint.config):  # layer after layer
            if tensor.path is not None:
                self._stacks.setdefault(tensor.path, []).append(tensor)
        self._with_nan: set[str] = set()

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype that holds a parameter exactly as it is stored: bfloat16 if all of it is, or else float32."""
        files = self._checkpoint.files
        kinds = {files[tensor.name].tensors[tensor.name].dtype for tensor in self._stacks[path]}
        return DTYPES["BF16" if kinds == {"BF16"} else "F32"]

    def read(self, path: str, index: tuple[slice, ...], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A part of a parameter.

        Args:
          path: dotted path of the parameter.
          index: one slice for each axis.
          shape: of the whole parameter.
          dtype: to cast to.
        """
        extents = tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))
        values = _aligned(extents, dtype)
        stack = self._stacks[path]
        if stack[0].index is None:
            self._read_tensor(stack[0], index, values)
        else:
            for row, tensor in enumerate(stack[index[0]]):
                self._read_tensor(tensor, index[1:], values[row, ...])
        return values

    def warn_of_nan(self) -> None:
        """Warns of the tensors in which NaN was read, if there were any."""
        _warn_of_nan(self._checkpoint.folder, self._with_nan)

    def _read_tensor(self, tensor: Tensor, index: tuple[slice, ...], target: np.ndarray) -> None:
        file = self._checkpoint.files[tensor.name]
        target, source = np.atleast_1d(target, tensor.to_ours(file.read(tensor.name))[index])
        rows = max(1, _MAPPED_BYTES * len(target) // max(1, target.nbytes))
        for start in range(0, len(target), rows):
            piece = target[start : start + rows]
            copy_transposed(piece, source[start : start + rows])
            if has_nan(piece):
                self._with_nan.add(tensor.name)
            file.release(tensor.name)


def _warn_of_nan(folder: Path, names: Collection[str]) -> None:
    if names:
        warnings.warn(f"{folder}: NaN in {', '.join(abbreviate(sorted(names)))}.", stacklevel=4)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty, where jax wants an array to begin that a CPU device takes over without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def load_state(checkpoint: Checkpoint, state: nnx.State, model_config: Gemma4Config) -> nnx.State:
    """The values of a model.

    Tensors that hold NaN are named in a warning.

    Args:
      checkpoint: where to read them.
      state: what to make: jax.ShapeDtypeStruct for every parameter and buffer, with the sharding it is to have (the
        default device without one). Values are cast to its dtypes.
      model_config: the architecture of the model. It may leave out towers.
    Returns:
      A state of the same structure with concrete arrays.
    Raises:
      InputError: the checkpoint is of another architecture or size.
    """
    _check_same_model(checkpoint, model_config)
    reader = ParameterReader(checkpoint)

    def load(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shards: dict[str, np.ndarray] = {}

        def shard(index: Any) -> np.ndarray:
            if str(index) not in shards:  # devices with copies of one shard ask for it one after another
                shards[str(index)] = reader.read(".".join(map(str, path)), index, leaf.shape, leaf.dtype)
            return shards[str(index)]

        return jax.make_array_from_callback(leaf.shape, sharding, shard)

    flat = [(path, variable.replace(load(path, variable.get_value()))) for path, variable in nnx.to_flat_state(state)]
    reader.warn_of_nan()
    return nnx.from_flat_state(flat)


def write_carried(checkpoint: Checkpoint, names: Collection[str], path: Path) -> None:
    """Copies tensors that a model does not use, bit for bit, to a file from which an export writes them again.

    Tensors that hold NaN are named in a warning.

    Args:
      checkpoint: where they are.
      names: from `Checkpoint.unused`.
      path: of the new file; it is there when all of it is.
    """
    outgoing = [OutgoingTensor.copy_of(checkpoint.files[name], name) for name in checkpoint.files if name in names]
    with_nan: set[str] = set()

    def watched(tensor: OutgoingTensor) -> Iterator[np.ndarray]:
        for block in tensor.blocks():
            if has_nan(block):
                with_nan.add(tensor.name)
            yield block

    outgoing = [tensor._replace(blocks=partial(watched, tensor)) for tensor in outgoing]
    towers = {
        f"{tower}_config": json.dumps(checkpoint.hf_config.get(f"{tower}_config")) for tower in ("vision", "audio")
    }
    temporary = beside(path, "tmp")
    try:
        write_tensor_file(temporary, outgoing, towers)
        temporary.replace(path)
        _warn_of_nan(checkpoint.folder, with_nan)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file that nobody vouches for.

    Raises:
      InputError: it cannot be read, is too large, or is not JSON, such as a git-lfs pointer.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= _MAX_JSON_BYTES else None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    if content is None:
        raise InputError(f"{path} is larger than {_MAX_JSON_BYTES} bytes: it is not of a checkpoint.")
    refuse_lfs_pointer(path, content)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also of numbers with more digits than Python reads
        raise InputError(f"{path} is not JSON ({error}).") from error


def _open_files(folder: Path) -> dict[str, TensorFile]:
    """Name of a tensor -> the file that holds it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        file = TensorFile(single)
        return dict.fromkeys(file.tensors, file)
    if not index.exists():
        raise InputError(f"{folder} has neither {single.name} nor {index.name}: it is not a checkpoint.")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensors to files.")
    located: dict[str, TensorFile] = {}
    for name in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"{index} points to {name!r}: only safetensors files in its own folder are read.")
        file = TensorFile(folder / name)
        if twice := located.keys() & file.tensors.keys():
            raise InputError(f"{file.path} repeats tensors of other files: {', '.join(abbreviate(sorted(twice)))}.")
        located |= dict.fromkeys(file.tensors, file)
    elsewhere = [name for name, file in located.items() if weight_map.get(name) != file.path.name]
    if elsewhere:
        raise InputError(f"{index} does not say where these tensors are: {', '.join(abbreviate(elsewhere))}.")
    return located


def _check_tensors(
    folder: Path, files: dict[str, TensorFile], expected: Iterable[Tensor], named: Callable[[str], str]
) -> None:
    """Names all that is missing, unexpected or of another shape, in one message, as the files name them."""
    table = {tensor.name: tensor for tensor in expected}
    missing = [name for name, tensor in table.items() if name not in files and not tensor.is_redundant]
    unexpected = [name for name in files if name not in table]
    misshapen = [
        f"{named(name)} is {list(file.tensors[name].shape)}, not {list(table[name].shape)}"
        for name, file in files.items()
        if name in table and file.tensors[name].shape != table[name].shape
    ]
    faults = [
        f"{len(names)} tensors {fault} ({'; '.join(abbreviate(map(named, names)))})"
        for fault, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if faults:
        raise InputError(f"{folder} is not what its config.json describes: {', '.join(faults)}.")


def _tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    return Tokenizer(path) if path.exists() else None


def _with_full_names(files: dict[str, TensorFile]) -> dict[str, TensorFile]:
    """The tensors of a decoder alone, by the names that they have in a whole checkpoint."""
    for file in set(files.values()):
        file.tensors = {full_name(name): stored for name, stored in file.tensors.items()}
    return {full_name(name): file for name, file in files.items()}


def _drop_tied_head(folder: Path, files: dict[str, TensorFile]) -> None:
    """Leaves out a head that is stored although it is the embedding.

    Raises:
      InputError: it is something else.
    """
    if HEAD not in files or EMBEDDING not in files:
        return
    stored = [(name, files[name]) for name in (HEAD, EMBEDDING)]
    is_same = len({file.tensors[name].shape for name, file in stored}) == 1 and all(
        np.array_equal(head, table, equal_nan=True)
        for head, table in zip(*(in_blocks(file.read(name), DTYPES["F32"]) for name, file in stored), strict=True)
    )
    for name, file in stored:
        file.release(name)
    if not is_same:
        raise InputError(
            f"{folder}: {HEAD} is not the token embedding, and only models whose head is tied are computed."
        )
    del files[HEAD]


def _check_same_model(checkpoint: Checkpoint, model_config: Gemma4Config) -> None:
    """Refuses a checkpoint that lacks a tensor of the model, or has it in another shape."""
    there = {tensor.name: tensor for tensor in tensors(checkpoint.config)}
    if not all(there.get(tensor.name) == tensor for tensor in tensors(model_config)):
        raise another_model(checkpoint.folder, differing_fields(checkpoint.config, model_config))


def another_model(source: Path, differing: list[str]) -> InputError:
    """The error about weights of another architecture, from `differing_fields`."""
    return InputError(f"{source} is another model: {'; '.join(differing)}.")


def differing_fields(given: Gemma4Config, wanted: Gemma4Config) -> list[str]:
    """Fields of the architecture in which a model is not as its source says; towers may be left out."""
    there, here = _fields(given), _fields(wanted)
    return [
        f"{field} is {there.get(field)!r}, and {value!r} in the model"
        for field, value in here.items()
        if there.get(field) != value
    ]


def _fields(config: Gemma4Config) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, fields in vars(config).items()
        if fields is not None
        for name, value in vars(fields).items()
    }
