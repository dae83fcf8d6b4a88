"""The Python API of checkpoints: a folder in Hugging Face's format to a model and its processor, and back."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gemma4_jax.chat import ChatTemplate, template_source
from gemma4_jax.config import Gemma4Config
from gemma4_jax.data.processor import Processor
from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path
from gemma4_jax.hf.leftovers import beside
from gemma4_jax.hf.load import Checkpoint, ParameterReader, load_state, read_json, write_carried
from gemma4_jax.hf.processor import COMPUTED_PIXELS, FEATURES, processor_config
from gemma4_jax.hf.save import STORED_AS, export_state
from gemma4_jax.model import Gemma4
from gemma4_jax.processes import led_by_first
from gemma4_jax.sharding import param_shardings
from gemma4_jax.tokenizer import NAMES, Tokenizer
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

DEFAULT_SOFT_TOKENS = 280
"""Budget of an image where a checkpoint names none, as in the reference."""


def load_hf(path: str | Path, *, dtype: Any = None, mesh: Mesh | None = None) -> tuple[Gemma4, Processor]:
    """A model and its processor, from a folder in Hugging Face's format.

    Args:
      path: of the folder: config.json, safetensors, tokenizer.json, and what else a release has.
      dtype: of parameters and activations, "float32" or "bfloat16". With None, parameters have the dtypes in which they
        are stored (float32 where the tensors of one differ, or are float16), and activations are float32 unless all of
        the checkpoint is stored in bfloat16.
      mesh: from `sharding.make_mesh`, to spread the model over; None is the default device. A model on a mesh is
        called inside of `jax.set_mesh(mesh)`.
    Returns:
      (model, processor).
    Raises:
      InputError: anything at all is wrong with the folder.
    """
    checkpoint = Checkpoint(path)
    kind = jnp.dtype(_stored_dtype(checkpoint) if dtype is None else dtype)
    if kind.name not in STORED_AS:
        raise InputError(f"dtype={kind.name} is not possible: a model is loaded as {' or '.join(STORED_AS)}.")
    processor = load_processor(checkpoint.folder, checkpoint.config)
    model = nnx.eval_shape(lambda: Gemma4(checkpoint.config, nnx.Rngs(0), dtype=kind, param_dtype=kind))
    graphdef, state = nnx.split(model)
    if dtype is None:
        state = _with_stored_dtypes(checkpoint, state)
    if mesh is not None:
        shardings = param_shardings(state, mesh)
        state = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), state, shardings)
    return nnx.merge(graphdef, load_state(checkpoint, state, checkpoint.config)), processor


def save_hf(model: Gemma4, processor: Processor, path: str | Path, *, dtype: str | None = None) -> None:
    """Writes a model and its processor as a folder in Hugging Face's format, whole or not at all.

    Tensors of the checkpoint that the model does not use, such as those of KV-shared layers, are carried along from
    the folder that the processor was loaded from. With many processes every one calls this; if one fails, all do.

    Args:
      model: on any mesh.
      processor: from `load_hf`, or made for the model.
      path: the folder to make; an earlier export in its place is replaced.
      dtype: of the stored tensors, "float32" or "bfloat16"; None is that of the parameters.
    Raises:
      InputError: the folder cannot be made, or the one that the model came from is no longer there.
    """
    state, path = nnx.state(model), local_path(path).absolute()
    carried = beside(path, "carried.safetensors")
    unused: list[str] = []
    try:
        with led_by_first():
            if processor.source is not None and jax.process_index() == 0:
                checkpoint = Checkpoint(processor.source)
                if unused := checkpoint.unused(state):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_carried(checkpoint, unused, carried)
        export_state(
            state,
            model.config,
            path,
            tokenizer=processor.tokenizer,
            max_soft_tokens=processor.max_soft_tokens,
            dtype=dtype,
            carried=carried if unused else None,
        )
    except OSError as error:
        raise InputError(f"{path} cannot be written ({(error.strerror or str(error)).lower()}).") from error
    finally:
        with contextlib.suppress(OSError):
            carried.unlink(missing_ok=True)


def load_processor(folder: Path, config: Gemma4Config) -> Processor:
    """The processor of a checkpoint.

    Args:
      folder: of the checkpoint.
      config: its architecture.
    Raises:
      InputError: a file of it cannot be read, or does not belong to the model.
    """
    tokenizer = Tokenizer.load(str(folder))
    if tokenizer.tokens != config.tokens:
        raise InputError(
            f"{folder}: the special tokens of tokenizer.json are {tokenizer.tokens}, and those of config.json "
            f"{config.tokens}: these files are not of one model."
        )
    source = template_source(folder)
    return Processor(
        tokenizer,
        config.vision,
        max_soft_tokens=_soft_tokens(folder, config),
        chat_template=None if source is None else ChatTemplate(source, tokenizer),
        stop_tokens=_stop_tokens(folder, tokenizer),
        source=folder,
        audio=config.audio,
    )


def _with_stored_dtypes(checkpoint: Checkpoint, state: nnx.State) -> nnx.State:
    """An abstract state in which every parameter has the dtype that holds its tensors as they are stored."""
    reader = ParameterReader(checkpoint)

    def stored(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, reader.stored_dtype(".".join(map(str, path))))

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, leaf.replace(stored(path, leaf.get_value()))) for path, leaf in flat])


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The narrower dtype only if no tensor would lose by it."""
    kinds = {file.tensors[name].dtype for name, file in checkpoint.files.items()}
    return "bfloat16" if kinds == {"BF16"} else "float32"


def _soft_tokens(folder: Path, config: Gemma4Config) -> int:
    """The budget of an image, once everything else that the file says of images and sounds is what we do with them."""
    path = folder / "processor_config.json"
    given = _optional_json(path)
    images = given.get("image_processor")
    budget = images.get("max_soft_tokens", DEFAULT_SOFT_TOKENS) if isinstance(images, dict) else DEFAULT_SOFT_TOKENS
    if budget not in SOFT_TOKEN_BUDGETS:
        accepted = ", ".join(map(str, SOFT_TOKEN_BUDGETS))
        raise InputError(f"{path}: max_soft_tokens={budget!r:.60} of images must be one of {accepted}.")
    expected = {}
    if config.vision is not None:
        pixels = processor_config(config.vision, budget)["image_processor"]
        expected["image_processor"] = {name: pixels[name] for name in COMPUTED_PIXELS}
    if config.audio is not None:
        expected["feature_extractor"] = FEATURES
    for section, fields in expected.items():
        theirs = given.get(section)
        said = theirs if isinstance(theirs, dict) else {}
        for name, value in fields.items():
            if said.get(name, value) != value:
                raise InputError(
                    f"{path}: {section}.{name}={said[name]!r:.60} is not supported: accepted is {value!r}."
                )
    return budget


def _stop_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    given = _optional_json(path).get("eos_token_id")
    if given is None:
        names = (NAMES["eos_token"], NAMES["eot_token"])
        return tuple(tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens)
    tokens = given if isinstance(given, list) else [given]
    if not all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in tokens):
        raise InputError(f"{path}: eos_token_id={given!r:.60} must be a token id, or a list of them.")
    return tuple(tokens)


def _optional_json(path: Path) -> dict[str, Any]:
    """The content of a file that a checkpoint may lack."""
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path} must be a JSON object.")
    return content
