"""Export: a model as a folder that Hugging Face's own classes load.

The folder is put together under another name and renamed when all of it is on the disk, so an export that was
interrupted is never seen.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from gemma4_jax.checkpoints.parameters import CheckpointParameters, Parameters, StateParameters
from gemma4_jax.config import Gemma4Config, VisionConfig
from gemma4_jax.errors import InputError
from gemma4_jax.fields import parse
from gemma4_jax.files import local_path
from gemma4_jax.hf.card import model_card
from gemma4_jax.hf.config import from_hf, generation_config, is_text_only, to_hf
from gemma4_jax.hf.leftovers import beside, remove_leftovers
from gemma4_jax.hf.names import Tensor, tensors, text_only_name
from gemma4_jax.hf.processor import CARRIED_FILES, processor_config, to_json, tokenizer_files
from gemma4_jax.hf.safetensors import DTYPES, OutgoingTensor, TensorFile, in_blocks, write_tensor_file
from gemma4_jax.hf.source import carry_config, carry_image_processor, carry_processor, read_source
from gemma4_jax.processes import led_by_first
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

STORED_AS = {"float32": "F32", "bfloat16": "BF16"}
"""The dtypes that an export can have, and what the file format calls them."""

MAX_SHARD_BYTES = 5_000_000_000
"""The most that one weights file holds, unless a single tensor is larger."""

CARRIED = "carried.safetensors"
"""The file in a run directory with tensors that the model does not use, for its exports."""

TOKENIZER = Path("tokenizer", "tokenizer.json")
"""The tokenizer in a run directory; beside it lie the files of a released model that its exports carry."""

PRODUCER = {"format": "pt", "producer": "gemma4-jax"}
"""Metadata of the weights files; a folder with other weights is not ours to replace."""

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_OUR_FILES = {"tokenizer.json", "README.md", *CARRIED_FILES}


def export_run(
    run_dir: str | Path, out_dir: str | Path, *, dtype: str | None = None, keeps_newer: bool = False
) -> bool:
    """Exports the newest intact checkpoint of a run, without ever holding more of it than one piece of an array.

    With many processes the first does it, and the others wait; if it fails, all of them raise.

    Args:
      run_dir: of the run.
      out_dir: the folder to make; an earlier export in its place is replaced.
      dtype: of the stored tensors, "float32" or "bfloat16"; None is that of each in the checkpoint.
      keeps_newer: an export in its place that is newer than the checkpoint stays.
    Returns:
      Whether this process wrote an export.
    Raises:
      InputError: there is no such run, or the folder cannot be made.
    """
    run_dir, out_dir, is_written = local_path(run_dir), local_path(out_dir), False
    with led_by_first():
        if jax.process_index() == 0:
            config, model_config = _run_config(run_dir)
            parameters = CheckpointParameters(run_dir)
            remove_leftovers(out_dir)
            if not (keeps_newer and _is_newer(out_dir, parameters.folder)):
                carried = run_dir / CARRIED
                _export(
                    _outgoing(parameters, model_config, dtype),
                    model_config,
                    out_dir,
                    tokenizer=_run_tokenizer(run_dir, config["tokenizer"]),
                    max_soft_tokens=config["data"]["soft_tokens_per_image"],
                    carried=carried if carried.exists() else None,
                    training=config,
                )
                is_written = True
    return is_written


def _is_newer(out_dir: Path, checkpoint: Path) -> bool:
    """Whether a whole export is there, made after the checkpoint; as it appears at once, its config.json tells."""
    config = out_dir / "config.json"
    if not config.exists() or _foreign_files(out_dir):
        return False
    return config.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns


def export_state(
    state: nnx.State,
    model_config: Gemma4Config,
    out_dir: str | Path,
    *,
    tokenizer: Tokenizer,
    max_soft_tokens: int,
    dtype: str | None = None,
    carried: Path | None = None,
) -> None:
    """Exports a model in memory. Where it is spread over processes, every process calls this; if one fails, all do.

    Args:
      state: its parameters and buffers.
      model_config: its architecture.
      out_dir: the folder to make; an earlier export in its place is replaced.
      tokenizer: carried along, with the files of a released model that lie beside it.
      max_soft_tokens: budget of an image.
      dtype: of the stored tensors, "float32" or "bfloat16"; None is that of each parameter.
      carried: a safetensors file of tensors that the model does not use, from `load.write_carried`.
    Raises:
      InputError: the folder cannot be made.
    """
    out_dir = local_path(out_dir)
    outgoing = _outgoing(StateParameters(state), model_config, dtype)  # raises in every process or in none
    with led_by_first():
        if jax.process_index() == 0:
            remove_leftovers(out_dir)
            _export(
                outgoing,
                model_config,
                out_dir,
                tokenizer=tokenizer,
                max_soft_tokens=max_soft_tokens,
                carried=carried,
            )
        elif any(not leaf.is_fully_addressable for leaf in jax.tree.leaves(state)):
            for tensor in outgoing:
                for _ in tensor.blocks():
                    pass


def _run_config(run_dir: Path) -> tuple[dict[str, Any], Gemma4Config]:
    """The config of a run, and the architecture in it."""
    path = run_dir / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise InputError(f"{run_dir} is not a run directory: its config.json cannot be read ({reason}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): it is not the config of a run.") from error
    fields = {"model": dict, "data": dict, "tokenizer": str}
    is_whole = isinstance(config, dict) and all(isinstance(config.get(name), kind) for name, kind in fields.items())
    if not is_whole or type(config["data"].get("soft_tokens_per_image")) is not int:
        raise InputError(f"{path} is not the config of a run.")
    try:
        return config, parse(Gemma4Config, config["model"], "model")
    except InputError as error:
        raise InputError(f"{path} is not the config of a run: {error}") from error


def _run_tokenizer(run_dir: Path, name: str) -> Tokenizer:
    """The tokenizer of a run: the one that it carries, or, of an older run, the one that its config names."""
    inside = run_dir / TOKENIZER
    if inside.is_file():
        return Tokenizer(inside)
    try:
        return Tokenizer.load(name)
    except InputError as error:
        raise InputError(
            f"{run_dir} was begun without a tokenizer of its own, and tokenizer={name!r} of its config cannot be read "
            f"here: copy that tokenizer.json to {inside}."
        ) from error


def _export(
    outgoing: list[OutgoingTensor],
    model_config: Gemma4Config,
    out_dir: Path,
    *,
    tokenizer: Tokenizer,
    max_soft_tokens: int,
    carried: Path | None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Makes the folder, in one process; `training` is the config of the run, for the model card."""
    dtype = "bfloat16" if {tensor.dtype for tensor in outgoing} == {"BF16"} else "float32"
    extra = None if carried is None else TensorFile(carried)
    if extra is not None:
        outgoing = _in_order([*outgoing, *(OutgoingTensor.copy_of(extra, name) for name in extra.tensors)])
    source = read_source(tokenizer.path.parent, model_config)
    config = _config(model_config, dtype, max_soft_tokens, outgoing, extra, source.get("config.json"))
    if is_text_only(config):
        outgoing = [tensor._replace(name=text_only_name(tensor.name)) for tensor in outgoing]
    files = tokenizer_files(tokenizer, model_config)
    files.setdefault("generation_config.json", to_json(generation_config(model_config.tokens)))
    if (vision := from_hf(config).vision) is not None:
        files |= _processor_files(vision, config["vision_soft_tokens_per_image"], source)
    files["README.md"] = model_card(config, files.keys(), sum(tensor.size for tensor in outgoing), training)
    # Last, for without it nothing takes the folder for a model.
    files["config.json"] = to_json(config)

    out_dir = out_dir.absolute()
    _check_destination(out_dir)
    temporary = beside(out_dir, "tmp")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        check_space(out_dir.parent, sum(tensor.num_bytes for tensor in outgoing))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_weights(temporary, outgoing)
        for name, content in files.items():
            write_file(temporary / name, content)
        sync_folder(temporary)
        _publish(temporary, out_dir)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"export to {out_dir} failed and left nothing there: {reason}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config(
    model_config: Gemma4Config,
    dtype: str,
    max_soft_tokens: int,
    outgoing: Sequence[OutgoingTensor],
    carried: TensorFile | None,
    source: dict[str, Any] | None,
) -> dict[str, Any]:
    """config.json, with what `source` says beside; towers that the export has no tensors of are null.

    A decoder alone has the form of one, unless its source has not.
    """
    towers = [t for t in ("vision", "audio") if any(x.name.startswith(f"model.{t}_tower.") for x in outgoing)]
    is_alone = not towers and (source is None or is_text_only(source))
    config = to_hf(model_config, dtype=dtype, max_soft_tokens=max_soft_tokens, is_text_only=is_alone)
    if not is_alone:
        for tower in ("vision", "audio"):
            section = config[f"{tower}_config"]
            if section is None and carried is not None:
                section = json.loads(carried.metadata[f"{tower}_config"])
            config[f"{tower}_config"] = section if tower in towers else None
        if model_config.vision is None and "vision" in towers:  # the budget is that of the model whose tower is carried
            budget = config["vision_config"].get("default_output_length")
            config["vision_soft_tokens_per_image"] = budget if budget in SOFT_TOKEN_BUDGETS else max_soft_tokens
    return config if source is None else carry_config(config, source)


def _processor_files(
    vision: VisionConfig, max_soft_tokens: int, source: Mapping[str, dict[str, Any]]
) -> dict[str, bytes]:
    """The files about images and sounds, with what their sources say beside."""
    processor = processor_config(vision, max_soft_tokens)
    files = {}
    if (theirs := source.get("preprocessor_config.json")) is not None:
        files["preprocessor_config.json"] = to_json(carry_image_processor(processor["image_processor"], theirs))
    theirs = source.get("processor_config.json")
    files["processor_config.json"] = to_json(processor if theirs is None else carry_processor(processor, theirs))
    return files


def _outgoing(parameters: Parameters, model_config: Gemma4Config, dtype: str | None) -> list[OutgoingTensor]:
    """Every tensor of the model. Those of one array follow each other, so that each piece of it is read once."""
    if dtype is not None and dtype not in STORED_AS:
        raise InputError(f"dtype={dtype!r} is not possible: an export is stored as {' or '.join(STORED_AS)}.")
    used = [tensor for tensor in tensors(model_config) if tensor.path in parameters.shapes]
    if missing := parameters.shapes.keys() - {tensor.path for tensor in used}:
        raise InputError(f"the model has parameters that an export has no names for: {', '.join(sorted(missing))}.")
    used.sort(key=lambda tensor: (tensor.path, tensor.index))
    outgoing = []
    for tensor in used:
        assert tensor.path is not None
        stored_as = STORED_AS.get(dtype or parameters.dtypes[tensor.path].name, STORED_AS["float32"])
        blocks = partial(_blocks, tensor, parameters, stored_as)
        outgoing.append(OutgoingTensor(tensor.name, stored_as, tensor.shape, blocks))
    return _in_order(outgoing)


def _in_order(outgoing: list[OutgoingTensor]) -> list[OutgoingTensor]:
    """Wide dtypes first: so every tensor of a file is aligned."""
    return sorted(outgoing, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)


def _blocks(tensor: Tensor, parameters: Parameters, stored_as: str) -> Iterator[np.ndarray]:
    """The values of a tensor in the order of the file, piece by piece."""
    assert tensor.path is not None
    if tensor.index is not None:
        start, slab = parameters.slab(tensor.path, tensor.index)
        pieces: list[np.ndarray] | Iterator[np.ndarray] = [slab[tensor.index - start]]
    else:
        pieces = _slabs(tensor.path, parameters)
        if tensor.order[0] != 0:  # rows here are not rows there
            pieces = [np.concatenate(list(pieces))]
    for piece in pieces:
        yield from in_blocks(piece.transpose(np.argsort(tensor.order)), DTYPES[stored_as])


def _slabs(path: str, parameters: Parameters) -> Iterator[np.ndarray]:
    row = 0
    while row < parameters.shapes[path][0]:
        row, slab = parameters.slab(path, row)
        yield slab
        row += len(slab)


def _write_weights(folder: Path, outgoing: Sequence[OutgoingTensor]) -> None:
    """One weights file, or several and an index."""
    shards: list[list[OutgoingTensor]] = [[]]
    size = 0
    for tensor in outgoing:
        size += tensor.num_bytes
        if shards[-1] and size > MAX_SHARD_BYTES:
            shards.append([])
            size = tensor.num_bytes
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_tensor_file(folder / "model.safetensors", outgoing, PRODUCER)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensor_file(folder / name, shard, PRODUCER)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in outgoing)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / "model.safetensors.index.json", to_json(index))


def _check_destination(out_dir: Path) -> None:
    """Refuses a place that holds anything but an earlier export."""
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise InputError(f"{out_dir} is a file: an export is a folder.")
    if foreign := _foreign_files(out_dir):
        listed = ", ".join(sorted(foreign)[:5])
        raise InputError(f"{out_dir} holds what is not an export of this package ({listed}): give another folder.")


def _foreign_files(folder: Path) -> list[str]:
    """Names of files that no export of this package has; without our weights, every name."""
    names = [path.name for path in folder.iterdir()]
    if foreign := [name for name in names if name not in _OUR_FILES and not _WEIGHTS.fullmatch(name)]:
        return foreign
    weights = [name for name in names if name.endswith(".safetensors")]
    return [name for name in weights if TensorFile(folder / name).metadata != PRODUCER] if weights else names


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuses to begin what the disk has no room for."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(f"the export needs {num_bytes} bytes, and {folder} has room for {free}.")


def write_file(path: Path, content: bytes) -> None:
    """Writes a new small file; it is on the disk when this returns."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names of the files in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(finished: Path, out_dir: Path) -> None:
    """Puts the finished folder in its place; what was there is deleted only when that is done."""
    old = beside(out_dir, "old")
    if out_dir.exists():
        out_dir.rename(old)
    try:
        finished.rename(out_dir)
    except OSError:
        if old.exists():
            old.rename(out_dir)
        raise
    sync_folder(out_dir.parent)
    shutil.rmtree(old, ignore_errors=True)
