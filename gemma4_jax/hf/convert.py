"""Conversion: a Hugging Face folder to a folder that runs begin from, and that can be exported again like a run."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from gemma4_jax.checkpoints.integrity import write_checksums
from gemma4_jax.checkpoints.parameters import flatten_paths
from gemma4_jax.checkpoints.streaming import StreamedArray, save_streamed
from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path
from gemma4_jax.hf.leftovers import beside, remove_leftovers
from gemma4_jax.hf.load import Checkpoint, ParameterReader, write_carried
from gemma4_jax.hf.pretrained import load_processor
from gemma4_jax.hf.processor import CARRIED_FILES
from gemma4_jax.hf.save import CARRIED, TOKENIZER, check_space, sync_folder, write_file
from gemma4_jax.model import Gemma4


def convert(hf_dir: str | Path, out_dir: str | Path) -> None:
    """Writes checkpoints/0/model (Orbax), config.json, the tokenizer, and the tensors that the model does not use.

    Parameters are streamed, so that no more than a few pieces of them are in memory. They keep the dtype in which they
    are stored; a run that begins from them casts them to its own. The folder can be moved.

    Args:
      hf_dir: the checkpoint to read. Tensors that hold NaN are named in a warning.
      out_dir: the folder to make; it must not exist. It is there when all of it is.
    Raises:
      InputError: the checkpoint is not acceptable, or the folder cannot be made.
    """
    out_dir = local_path(out_dir).absolute()
    remove_leftovers(out_dir)
    if out_dir.exists():
        raise InputError(f"{out_dir} is there already: give a folder that is not.")
    checkpoint = Checkpoint(hf_dir)
    processor = load_processor(checkpoint.folder, checkpoint.config)
    temporary = beside(out_dir, "tmp")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        state = nnx.state(nnx.eval_shape(lambda: Gemma4(checkpoint.config, nnx.Rngs(0))))
        unused = checkpoint.unused(state)
        check_space(out_dir.parent, _num_bytes(checkpoint, state, unused))
        (temporary / TOKENIZER.parent).mkdir(parents=True)
        for name in ("tokenizer.json", *CARRIED_FILES):
            if (checkpoint.folder / name).is_file():
                write_file(temporary / TOKENIZER.parent / name, (checkpoint.folder / name).read_bytes())
        if unused:
            write_carried(checkpoint, unused, temporary / CARRIED)
        _write_parameters(checkpoint, state, temporary / "checkpoints" / "0" / "model")
        write_checksums(temporary / "checkpoints" / "0")
        content = {
            "model": dataclasses.asdict(checkpoint.config),
            "tokenizer": TOKENIZER.as_posix(),  # in this folder, wherever that is
            "data": {"soft_tokens_per_image": processor.max_soft_tokens},
        }
        write_file(temporary / "config.json", (json.dumps(content, indent=2) + "\n").encode())
        sync_folder(temporary)
        temporary.rename(out_dir)
        sync_folder(out_dir.parent)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{out_dir} cannot be written and nothing was left there: {reason}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _num_bytes(checkpoint: Checkpoint, state: nnx.State, unused: list[str]) -> int:
    """What the values of a conversion need on the disk: an abstract state, and the tensors that it does not use."""
    reader = ParameterReader(checkpoint)
    paths = flatten_paths(nnx.to_pure_dict(state))
    used_bytes = sum(math.prod(leaf.shape) * reader.stored_dtype(path).itemsize for path, leaf in paths.items())
    return used_bytes + checkpoint.num_bytes(unused)


def _write_parameters(checkpoint: Checkpoint, state: nnx.State, folder: Path) -> None:
    """Streams every parameter and buffer of an abstract state into an Orbax checkpoint."""
    reader = ParameterReader(checkpoint)

    def streamed(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> StreamedArray:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        dtype = reader.stored_dtype(path)
        return StreamedArray(leaf.shape, dtype, lambda index: reader.read(path, index, leaf.shape, dtype))

    save_streamed(folder, jax.tree.map_with_path(streamed, nnx.to_pure_dict(state)))
    reader.warn_of_nan()
