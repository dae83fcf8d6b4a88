"""The files beside the weights that make the reference's tokenizer and processor classes work."""

import json
from typing import Any

from gemma4_jax.audio.features import FFT, FLOOR, FRAME, HOP, MAX_HERTZ, SAMPLE_RATE
from gemma4_jax.config import Gemma4Config, VisionConfig
from gemma4_jax.tokenizer import NAMES, ROLES, Tokenizer

COPIED_FILES = (
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
)  # fmt: skip
"""Files that are carried along untouched if they lie beside the tokenizer.json of a run, as in a released model."""

CARRIED_FILES = (*COPIED_FILES, "config.json", "processor_config.json", "preprocessor_config.json")
"""These too; of the last three, what this package has no field for goes into the files that it writes."""


def tokenizer_files(tokenizer: Tokenizer, model_config: Gemma4Config) -> dict[str, bytes]:
    """Name -> content of every file that the reference's tokenizer class reads; tokenizer.json is carried untouched."""
    content = tokenizer.path.read_bytes()
    beside = {name: tokenizer.path.with_name(name) for name in COPIED_FILES}
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
        # All that the reference saves itself, for some readers have no defaults.
        "feature_extractor": {
            "feature_extractor_type": "Gemma4AudioFeatureExtractor",
            **FEATURES,
            "padding_value": 0.0,
            "padding_side": "right",
            "return_attention_mask": True,
        },
    }


COMPUTED_PIXELS = (
    "do_resize", "do_rescale", "rescale_factor", "do_normalize", "resample", "patch_size", "pooling_kernel_size",
)  # fmt: skip
"""Fields of the image processor on which the pixels depend."""

FEATURES = {
    "feature_size": 128,
    "sampling_rate": SAMPLE_RATE,
    "frame_length": FRAME,
    "hop_length": HOP,
    "fft_length": FFT,
    "fft_overdrive": False,
    "min_frequency": 0.0,
    "max_frequency": MAX_HERTZ,
    "mel_floor": FLOOR,
    "dither": 0.0,
    "input_scale_factor": 1.0,
    "preemphasis": 0.0,
    "preemphasis_htk_flavor": True,
    "per_bin_mean": None,
    "per_bin_stddev": None,
}
"""What `audio.features` computes, in the reference's fields."""


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
