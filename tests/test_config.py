"""Gemma4Config holds what the specification says, and cannot hold an impossible model."""

import dataclasses

import pytest

from gemma4_jax.config import AudioConfig, Gemma4Config, SpecialTokens, VisionConfig
from gemma4_jax.errors import InputError
from gemma4_jax.sizes import SIZES

IMPOSSIBLE_TEXT = [
    ({"num_heads": 3}, "num_kv_heads"),
    ({"num_kv_heads": 0}, "num_kv_heads"),
    ({"num_global_kv_heads": 3}, "num_global_kv_heads"),
    ({"uses_k_eq_v": False}, "num_global_kv_heads"),
    ({"num_layers": 5}, "num_layers"),
    ({"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": 4}, "num_kv_shared_layers"),
    ({"head_dim": 15}, "head_dim"),
    ({"global_head_dim": 31}, "global_head_dim"),
    ({"global_rope_fraction": 0.3}, "global_rope_fraction"),
    ({"global_rope_fraction": 1.25}, "global_rope_fraction"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"per_layer_embed_dim": -1}, "per_layer_embed_dim"),
    ({"num_experts_per_token": 5}, "num_experts_per_token"),
    ({"num_experts_per_token": 0}, "num_experts_per_token"),
    ({"expert_dim": 0}, "expert_dim"),
    ({"final_logit_softcap": -1.0}, "final_logit_softcap"),
]


@pytest.mark.parametrize(("change", "field"), IMPOSSIBLE_TEXT)
def test_impossible_text_names_the_field_and_its_value(change, field):
    text = SIZES["quickstart"]().text
    with pytest.raises(InputError) as error:
        dataclasses.replace(text, **change)
    value = change.get(field, getattr(text, field))
    assert str(error.value).startswith(f"model.text.{field}={value!r} is not possible: it must be ")


@pytest.mark.parametrize(("change", "field"), [({"head_dim": 18}, "head_dim"), ({"patch_size": 0}, "patch_size")])
def test_impossible_vision_tower(change, field):
    with pytest.raises(InputError, match=rf"model\.vision\.{field}="):
        VisionConfig(**{"embed_dim": 8, "mlp_dim": 8, "num_layers": 1, "num_heads": 2, "head_dim": 4} | change)


def test_impossible_audio_tower():
    with pytest.raises(InputError, match=r"model\.audio\.num_heads=7"):
        AudioConfig(num_heads=7)


def test_special_tokens_must_be_in_the_vocabulary():
    text = SIZES["quickstart"]().text
    with pytest.raises(InputError, match=r"model\.tokens\.image=258880"):
        Gemma4Config(text, tokens=SpecialTokens(begin_image=7))


@pytest.mark.parametrize("name", SIZES)
def test_last_layer_of_each_period_is_global(name):
    text = SIZES[name]().text
    layers = [text.is_global(layer) for layer in range(text.num_layers)]
    assert layers[-1]
    assert sum(layers) * text.attention_period == text.num_layers


def test_official_sizes_are_those_of_the_table():
    """Spec section 1, row by row."""
    rows = {
        "num_layers": (35, 42, 30, 60),
        "attention_period": (5, 6, 6, 6),
        "embed_dim": (1536, 2560, 2816, 5376),
        "mlp_dim": (6144, 10240, 2112, 21504),
        "num_heads": (8, 8, 16, 32),
        "num_kv_heads": (1, 2, 8, 16),
        "num_global_kv_heads": (1, 2, 2, 4),
        "sliding_window": (512, 512, 1024, 1024),
        "uses_k_eq_v": (False, False, True, True),
        "num_kv_shared_layers": (20, 18, 0, 0),
        "uses_double_wide_mlp": (True, False, False, False),
        "per_layer_embed_dim": (256, 256, 0, 0),
        "num_experts": (0, 0, 128, 0),
        "image_blocks_bidirectional": (False, False, True, True),
        "max_positions": (131072, 131072, 262144, 262144),
    }
    sizes = [SIZES[name]().text for name in ("e2b", "e4b", "26b_a4b", "31b")]
    for field, values in rows.items():
        assert tuple(getattr(size, field) for size in sizes) == values, field


@pytest.mark.parametrize("name", ["small", "quickstart", "tiny"])
def test_small_presets_have_every_part_switched_on(name):
    config = SIZES[name]()
    text, vision = config.text, config.vision
    assert text.uses_k_eq_v
    assert text.num_kv_shared_layers
    assert text.uses_double_wide_mlp
    assert text.per_layer_embed_dim
    assert text.num_experts
    assert text.image_blocks_bidirectional
    assert vision.uses_clipped_linears
    assert vision.standardizes
