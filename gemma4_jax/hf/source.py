"""What the folder that a model came from says beyond what this package has fields for: exports say it again.

The folder is that of the tokenizer. Its config.json must be of the exported architecture: what another model says of
itself is not carried.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma4_jax.config import Gemma4Config
from gemma4_jax.errors import InputError
from gemma4_jax.hf.config import from_hf
from gemma4_jax.hf.load import differing_fields, read_json

_OTHER_NAMES = {"torch_dtype": "dtype", "eoa_token_id": "eoa_token_index"}
"""Fields that say again what we write under another name: they follow it."""

_OVERRULED = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
"""Fields that older readers took for what is in rope_parameters."""

Content = dict[str, Any]


def read_source(folder: Path, model_config: Gemma4Config) -> dict[str, Content]:
    """Name -> content of config.json, processor_config.json and preprocessor_config.json, as far as they are there.

    Args:
      folder: where a model may have come from.
      model_config: the architecture that is exported. It may leave out towers.
    Returns:
      Nothing at all if the folder holds no config.json of that architecture.
    Raises:
      InputError: a file beside such a config.json is not a JSON object.
    """
    try:
        config = read_json(folder / "config.json")
        if differing_fields(from_hf(config, model_config.tokens), model_config):
            return {}
    except InputError:  # the config of a run, or of another kind of model
        return {}
    found = {"config.json": config}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (path := folder / name).is_file():
            found[name] = read_json(path)
            if not isinstance(found[name], dict):
                raise InputError(f"{path} must be a JSON object.")
    return found


def carry_config(ours: Content, theirs: Content) -> Content:
    """Our config.json with every field of theirs, at any level, that ours does not have."""
    carried = _carry(ours, theirs)
    text, source = carried.get("text_config", carried), theirs.get("text_config", theirs)
    eos = source.get("eos_token_id")
    if isinstance(eos, list) and eos[0] == text["eos_token_id"]:
        text["eos_token_id"] = eos  # several tokens end a generation, and the first a document
    return carried


def carry_processor(ours: Content, theirs: Content) -> Content:
    """The same of processor_config.json. What this package does not read is theirs wherever they differ."""
    carried = _carry(ours, theirs)
    for name in ("video_processor", "feature_extractor"):
        if isinstance(theirs.get(name), dict):
            carried[name] = {**ours[name], **theirs[name]}
    return carried


def carry_image_processor(ours: Content, theirs: Content) -> Content:
    """Their preprocessor_config.json, in the form before processor_config.json, with our values."""
    return {name: ours.get(name, value) for name, value in theirs.items()}


def _carry(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Content:
    carried = dict(ours)
    for name, value in theirs.items():
        if name in ours:
            if isinstance(ours[name], dict) and isinstance(value, dict):
                carried[name] = _carry(ours[name], value)
        elif _OTHER_NAMES.get(name) in ours:
            carried[name] = ours[_OTHER_NAMES[name]]
        elif name not in _OVERRULED:
            carried[name] = value
    return carried
