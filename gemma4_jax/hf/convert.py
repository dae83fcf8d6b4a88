"""Conversion: a Hugging Face folder to a folder that runs begin from, and that can be exported again like a run."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx

from gemma4_jax.config import Gemma4Config
from gemma4_jax.errors import InputError
from gemma4_jax.hf.load import Checkpoint, load_state, write_carried
from gemma4_jax.hf.pretrained import load_processor
from gemma4_jax.hf.processor import CARRIED_FILES
from gemma4_jax.hf.save import CARRIED
from gemma4_jax.model import Gemma4

MAX_CHUNK_BYTES = 2**28
"""The most of an array that is written in one piece, and so read in one piece by an export."""


def convert(hf_dir: str | Path, out_dir: str | Path) -> None:
    """Writes checkpoints/0/model (Orbax), config.json, the tokenizer, and the tensors that the model does not use.

    Args:
      hf_dir: the checkpoint to read. Parameters become float32, as training holds them.
      out_dir: the folder to make; it must not exist. It is there when all of it is.
    Raises:
      InputError: the checkpoint is not acceptable, or the folder cannot be made.
    """
    out_dir = Path(out_dir).absolute()
    if out_dir.exists():
        raise InputError(f"{out_dir} is there already: give a folder that is not.")
    checkpoint = Checkpoint(hf_dir)
    processor = load_processor(checkpoint.folder, checkpoint.config)
    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    try:
        (temporary / "tokenizer").mkdir(parents=True)
        for name in ("tokenizer.json", *CARRIED_FILES):
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, temporary / "tokenizer" / name)
        state = _abstract(checkpoint.config)
        if unused := checkpoint.unused(state):
            write_carried(checkpoint, unused, temporary / CARRIED)
        values = load_state(checkpoint, state, checkpoint.config)
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = nnx.to_pure_dict(values)
            in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES), arrays)
            checkpointer.save(temporary / "checkpoints" / "0" / "model", arrays, save_args=in_chunks)
        content = {
            "model": dataclasses.asdict(checkpoint.config),
            "tokenizer": str(out_dir / "tokenizer" / "tokenizer.json"),
            "data": {"soft_tokens_per_image": processor.max_soft_tokens},
        }
        (temporary / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        temporary.rename(out_dir)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{out_dir} cannot be written and nothing was left there: {reason}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _abstract(config: Gemma4Config) -> nnx.State:
    """Parameters and buffers on the CPU, whatever accelerators there are: nothing is computed."""
    state = nnx.state(nnx.eval_shape(lambda: Gemma4(config, nnx.Rngs(0))))
    on_cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_cpu), state)
