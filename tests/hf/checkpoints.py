"""Checkpoints in Hugging Face's format as somebody else would have written them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from gemma4_jax.config import Gemma4Config
from gemma4_jax.hf.config import to_hf
from gemma4_jax.hf.load import Checkpoint
from gemma4_jax.hf.names import tensors
from gemma4_jax.hf.processor import processor_config, to_json
from gemma4_jax.hf.safetensors import DTYPES, OutgoingTensor, in_blocks, write_tensor_file
from tests import conversations
from tests.hf import samples


def write_release(
    folder: Path,
    config: Gemma4Config,
    change: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array,
) -> Path:
    """A release in miniature, with the tensors of KV-shared layers that no model uses.

    Args:
      folder: to make.
      config: with the token ids of the bundled tokenizer, and a vocabulary as large.
      change: what to store in place of a tensor, in float32 until then.
    """
    folder.mkdir(parents=True)
    conversations.write_tokenizer(folder, in_place_of_rare_tokens=True)
    rng = np.random.default_rng(5)
    redundant = {t.name: rng.standard_normal(t.shape, np.float32) for t in tensors(config) if t.is_redundant}
    names = {dtype: name for name, dtype in DTYPES.items()}
    arrays = {name: change(name, array) for name, array in (samples.restless_weights(config) | redundant).items()}
    outgoing = [
        OutgoingTensor(name, names[array.dtype], array.shape, partial(in_blocks, array))
        for name, array in arrays.items()
    ]
    write_tensor_file(folder / "model.safetensors", outgoing, {"format": "pt"})
    files = {
        "config.json": to_hf(config, dtype="float32", max_soft_tokens=70),
        "generation_config.json": {"eos_token_id": [1, 6], "do_sample": True},
    }
    if config.vision is not None:
        files["processor_config.json"] = processor_config(config.vision, 70)
    for name, content in files.items():
        (folder / name).write_bytes(to_json(content))
    (folder / "chat_template.jinja").write_text(conversations.GEMMA4)
    return folder


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes of every tensor."""
    files = Checkpoint(folder).files
    return {name: (*file.tensors[name][:2], file.read(name).tobytes()) for name, file in files.items()}
