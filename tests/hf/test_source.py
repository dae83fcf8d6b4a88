"""What a folder says that this package has no fields for is said again by what is made of it."""

import json
import shutil
from pathlib import Path

import pytest

import gemma4_jax
from gemma4_jax import sizes
from gemma4_jax.errors import InputError
from gemma4_jax.hf.convert import convert
from gemma4_jax.hf.pretrained import _soft_tokens
from gemma4_jax.hf.save import export_run
from gemma4_jax.hf.source import carry_config, read_source
from tests.hf import checkpoints

CONFIG = sizes.tiny()
FEATURES = {"frame_length_ms": 20.0, "hop_length_ms": 10.0, "padding_side": "left"}

UNKNOWN = {
    "config.json": {
        "transformers_version": "5.5.0",
        "torch_dtype": "bfloat16",
        "eoa_token_id": 3,
        "note": [1],
        "text_config": {"eos_token_id": [1, 6], "rope_theta": 5.0, "note": {"a": 1}},
        "vision_config": {"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "note": 2}},
    },
    "processor_config.json": {
        "image_processor": {"data_format": "channels_first"},
        "video_processor": {"return_metadata": True, "num_frames": 8},
        "feature_extractor": FEATURES,
    },
    "preprocessor_config.json": {"size": None, "patch_size": 4, "max_soft_tokens": 1},
    "tokenizer_config.json": {"a": {"b": 1}},
    "generation_config.json": {"eos_token_id": [1, 6], "top_k": 64},
    "special_tokens_map.json": {"bos_token": "<bos>"},
}


def merge(ours: dict, theirs: dict) -> dict:
    """Theirs, put over ours at every level."""
    nested = {name: merge(ours[name], value) for name, value in theirs.items() if isinstance(ours.get(name), dict)}
    return {**ours, **theirs, **nested}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = checkpoints.write_release(tmp_path_factory.mktemp("source") / "in", CONFIG)
    for name, content in UNKNOWN.items():
        written = read(folder / name) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(merge(written, content)))
    (folder / "LICENSE").write_text("Apache-2.0")
    return folder


def assert_carried(out: Path, folder: Path) -> None:
    config, processor = read(out / "config.json"), read(out / "processor_config.json")
    assert config["note"] == [1]
    assert config["transformers_version"] == "5.5.0"
    assert config["text_config"]["note"] == {"a": 1}
    assert config["text_config"]["eos_token_id"] == [1, 6]
    assert config["vision_config"]["max_position_embeddings"] == 131072
    assert config["vision_config"]["rope_parameters"]["note"] == 2
    assert processor["image_processor"]["data_format"] == "channels_first"
    assert processor["video_processor"]["return_metadata"]
    assert processor["video_processor"]["num_frames"] == 8
    assert processor["feature_extractor"].items() >= FEATURES.items()
    assert read(out / "preprocessor_config.json") == {"size": None, "patch_size": 4, "max_soft_tokens": 70}
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "LICENSE"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    # What says again, under another name, what we write, follows it.
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["eoa_token_id"] == config["eoa_token_index"] == CONFIG.tokens.end_audio
    assert "rope_theta" not in config["text_config"]


def test_through_the_python_api(folder, tmp_path):
    gemma4_jax.save_hf(*gemma4_jax.load_hf(folder), tmp_path / "out")
    assert_carried(tmp_path / "out", folder)


def test_through_a_conversion_that_was_moved(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "in")
    convert(source, tmp_path / "converted")
    shutil.rmtree(source)
    export_run((tmp_path / "converted").rename(tmp_path / "moved"), tmp_path / "out")
    assert_carried(tmp_path / "out", folder)
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(folder)


def test_another_model_says_nothing_of_this_one(folder):
    assert read_source(folder, CONFIG).keys() == {"config.json", "processor_config.json", "preprocessor_config.json"}
    assert read_source(folder, sizes.quickstart()) == {}
    assert read_source(folder.parent, CONFIG) == {}


def test_a_tower_that_is_left_out_stays_out(folder):
    ours = {"vision_config": None, "text_config": {"eos_token_id": 1}}
    assert carry_config(ours, read(folder / "config.json"))["vision_config"] is None


@pytest.mark.parametrize(
    ("size", "section", "field"),
    [
        ("tiny", "image_processor", {"do_normalize": True}),
        ("tiny", "image_processor", {"patch_size": 16}),
        ("tiny with audio", "feature_extractor", {"hop_length": 320}),
    ],
)
def test_a_processor_that_is_not_computed_is_refused(size, section, field, folder, tmp_path):
    config = CONFIG if size == "tiny" else sizes.e2b()
    content = read(folder / "processor_config.json")
    content["image_processor"] |= {"patch_size": config.vision.patch_size}
    content["image_processor"] |= {"pooling_kernel_size": config.vision.pooling_size}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    assert _soft_tokens(tmp_path, config) == 70
    (tmp_path / "processor_config.json").write_text(json.dumps(merge(content, {section: field})))
    with pytest.raises(InputError, match=rf"{section}\.{next(iter(field))}=.* is not supported"):
        _soft_tokens(tmp_path, config)
