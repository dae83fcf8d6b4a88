import copy
import dataclasses
import json

import pytest

from gemma4_jax import sizes
from gemma4_jax.config import Gemma4Config
from gemma4_jax.errors import InputError
from gemma4_jax.hf.config import from_hf, generation_config, to_hf
from tests.hf import samples

CONFIGS = {
    **{name: make() for name, make in sizes.SIZES.items()},
    **{f"small {name}": samples.shrink(name, with_audio=True) for name in samples.OFFICIAL_SIZES},
    "text only": dataclasses.replace(sizes.e2b(), vision=None, audio=None),
}


def written(config: Gemma4Config) -> dict:
    """config.json as a reader finds it."""
    return json.loads(json.dumps(to_hf(config, dtype="bfloat16", max_soft_tokens=280)))


@pytest.fixture
def content() -> dict:
    return written(sizes.quickstart())


def change(content: dict, path: str, value) -> dict:
    content = copy.deepcopy(content)
    *sections, name = path.split(".")
    place = content
    for section in sections:
        place = place[section]
    place[name] = value
    return content


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name):
    assert from_hf(written(CONFIGS[name])) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_without_the_form_that_only_transformers_writes(name):
    content = written(CONFIGS[name])
    del content["text_config"]["per_layer_config"]
    assert from_hf(content) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_without_the_form_that_transformers_no_longer_writes(name):
    content = written(CONFIGS[name])
    del content["text_config"]["global_head_dim"], content["text_config"]["num_global_key_value_heads"]
    assert from_hf(content) == CONFIGS[name]


def test_a_released_file():
    """The fields that google/gemma-4-E2B-it writes in a way of its own."""
    content = written(sizes.e2b())
    del content["text_config"]["per_layer_config"]
    content["text_config"] |= {"eos_token_id": [1, 106], "use_cache": True, "unknown_to_us": 3}
    content["vision_config"] |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "id2label": {"0": "x"},
    }
    content |= {"eoa_token_id": 258883, "transformers_version": "5.5.0"}
    assert from_hf(content) == sizes.e2b()


def test_missing_fields_have_the_defaults_of_the_reference():
    content = {"model_type": "gemma4", "text_config": {}, "vision_config": {}, "audio_config": {}}
    config = from_hf(content)
    assert (config.text.embed_dim, config.text.num_layers, config.text.attention_period) == (2304, 30, 6)
    assert (config.text.final_logit_softcap, config.text.global_head_dim, config.text.num_global_kv_heads) == (
        0,
        512,
        4,
    )
    assert config.vision == dataclasses.replace(sizes.e2b().vision, uses_clipped_linears=False)
    assert config.audio == sizes.e2b().audio


def test_the_last_layer_is_global_whatever_the_list_says(content):
    layer_types = content["text_config"]["layer_types"]
    assert layer_types[-1] == "full_attention"
    assert from_hf(change(content, "text_config.layer_types", [*layer_types[:-1], "sliding_attention"])) == from_hf(
        content
    )


UNSUPPORTED = [
    ("model_type", "gemma3"),
    ("architectures", ["Gemma4ForCausalLM"]),
    ("quantization_config", {"bits": 4}),
    ("tie_word_embeddings", False),
    ("text_config", None),
    ("text_config", [1]),
    ("text_config.attention_bias", True),
    ("text_config.hidden_activation", "silu"),
    ("text_config.use_bidirectional_attention", "all"),
    ("text_config.tie_word_embeddings", False),
    ("text_config.vocab_size_per_layer_input", 512),
    ("text_config.hidden_size", "64"),
    ("text_config.hidden_size", 64.0),
    ("text_config.hidden_size", True),
    ("text_config.num_hidden_layers", 10**9),
    ("text_config.rms_norm_eps", "1e-6"),
    ("text_config.rms_norm_eps", 10**400),
    ("text_config.attention_k_eq_v", 1),
    ("text_config.num_experts", None),
    ("text_config.num_experts", 0),
    ("text_config.layer_types", ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]),
    ("text_config.layer_types", ["sliding_attention", "chunked", "sliding_attention", "full_attention"]),
    ("text_config.layer_types", ["sliding_attention", "full_attention"]),
    ("text_config.per_layer_config", {"1": {"head_dim": 32}}),
    ("text_config.per_layer_config", {"1": {"head_dim": 32}, "3": {"head_dim": 16}}),
    ("text_config.per_layer_config", {"1": {"intermediate_size": 3}, "3": {"intermediate_size": 3}}),
    ("text_config.rope_parameters", {"full_attention": {"rope_type": "yarn"}}),
    ("text_config.rope_parameters", {"full_attention": {"rope_type": "proportional", "factor": 8.0}}),
    ("text_config.rope_parameters", {"sliding_attention": {"rope_type": "proportional"}}),
    ("text_config.pad_token_id", None),
    ("text_config.eos_token_id", []),
    ("text_config.eos_token_id", ["1"]),
    ("image_token_id", None),
    ("vision_config.num_hidden_layers", 10**9),
    ("vision_config.num_key_value_heads", 1),
    ("vision_config.hidden_activation", "gelu"),
    ("vision_config.rope_parameters", {"rope_type": "linear"}),
    ("audio_config", {"num_hidden_layers": 0}),
    ("audio_config", {"hidden_act": "gelu"}),
    ("audio_config", {"subsampling_conv_channels": [128]}),
]


@pytest.mark.parametrize(("path", "value"), UNSUPPORTED)
def test_what_is_not_computed_is_refused_in_one_sentence(content, path, value):
    with pytest.raises(InputError) as error:
        from_hf(change(content, path, value))
    message = str(error.value)
    assert message.startswith("config.json")
    assert message.endswith(".")
    assert "\n" not in message
    assert path.rsplit(".", 1)[-1] in message or "audio_config" in message


@pytest.mark.parametrize("content", [None, [], "{}", {"model_type": "gemma4", "text_config": {"hidden_size": -1}}])
def test_not_a_config(content):
    with pytest.raises(InputError):
        from_hf(content)


def test_impossible_sizes_are_refused_by_the_architecture(content):
    with pytest.raises(InputError, match="num_heads"):
        from_hf(change(content, "text_config.num_attention_heads", 3))
    with pytest.raises(InputError, match=r"tokens\.image"):
        from_hf(change(content, "image_token_id", 5000))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_it_and_writes_it_back(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(written(config)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Gemma4Config"
    theirs.save_pretrained(tmp_path / "again")
    assert from_hf(json.loads((tmp_path / "again" / "config.json").read_text())) == config
    assert from_hf(json.loads(json.dumps(theirs.to_dict()))) == config


def test_what_readers_look_for():
    """transformers before 5.17 knows no other rope type, and mlx-lm no other place of the vocabulary's size."""
    content = written(sizes.e2b())
    assert content["vision_config"]["rope_parameters"]["rope_type"] == "default"
    assert content["vocab_size"] == content["text_config"]["vocab_size"] == 262144


def test_generation_config():
    assert generation_config(sizes.BUNDLED_TOKENS) == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
