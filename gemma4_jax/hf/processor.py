"""The files beside the weights that make the reference's tokenizer and processor classes work."""

import json
from typing import Any

from gemma4_jax.config import Gemma4Config, VisionConfig
from gemma4_jax.tokenizer import NAMES, ROLES, Tokenizer

CARRIED_FILES = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""Files that are carried along untouched if they lie beside the tokenizer.json of a run, as in a released model."""


def tokenizer_files(tokenizer: Tokenizer, model_config: Gemma4Config) -> dict[str, bytes]:
    """Name -> content of every file that the reference's tokenizer class reads; tokenizer.json is carried untouched."""
    content = tokenizer.path.read_bytes()
    beside = {name: tokenizer.path.with_name(name) for name in CARRIED_FILES}
    carried = {name: path.read_bytes() for name, path in beside.items() if path.is_file()}
    made = {"tokenizer_config.json": _tokenizer_config(content, model_config.text.max_positions)}
    return {"tokenizer.json": content, **{name: to_json(value) for name, value in made.items()}, **carried}


def processor_config(vision: VisionConfig, max_soft_tokens: int) -> dict[str, Any]:
    """The content of processor_config.json.

    Args:
      vision: the tower that reads the images.
      max_soft_tokens: budget of an image.
    """
    pixels = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,  # bicubic
        "patch_size": vision.patch_size,
        "pooling_kernel_size": vision.pooling_size,
    }
    return {
        "processor_class": "Gemma4Processor",
        "image_seq_length": max_soft_tokens,
        "audio_seq_length": 750,
        "audio_ms_per_token": 40,
        # Without torchvision, transformers takes this name for the same class on Pillow.
        "image_processor": {
            "image_processor_type": "Gemma4ImageProcessor",
            **pixels,
            "max_soft_tokens": max_soft_tokens,
            "image_seq_length": max_soft_tokens,
        },
        "video_processor": {
            "video_processor_type": "Gemma4VideoProcessor",
            **pixels,
            "max_soft_tokens": 70,
            "num_frames": 32,
            "do_sample_frames": True,
        },
        "feature_extractor": {
            "feature_extractor_type": "Gemma4AudioFeatureExtractor",
            "feature_size": 128,
            "sampling_rate": 16000,
            "padding_value": 0.0,
            "return_attention_mask": True,
        },
    }


def to_json(content: Any) -> bytes:
    """The text of a JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _tokenizer_config(tokenizer_json: bytes, max_positions: int) -> dict[str, Any]:
    known = {token["content"] for token in json.loads(tokenizer_json)["added_tokens"]}
    return {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "Gemma4Processor",
        **{name: token for name, token in NAMES.items() if token in known},
        "extra_special_tokens": [ROLES["video"]],
        "padding_side": "left",
        "model_max_length": max_positions,
    }
