"""What an export says of itself to a reader."""

import dataclasses

import pytest

from gemma4_jax import sizes
from gemma4_jax.configs import quickstart
from gemma4_jax.hf.card import model_card
from gemma4_jax.hf.config import to_hf

FILES = {"config.json", "tokenizer.json"}


def card(config, files=FILES, training=None, **options) -> str:
    content = to_hf(config, dtype="float32", max_soft_tokens=70, **options)
    return model_card(content, files, 1_234_567, training).decode()


def test_a_run_on_what_ships():
    training = quickstart.get_config().to_dict()
    text = card(sizes.quickstart(), training=training)
    for part in (
        "1,234,567, stored as float32",
        "Trained from random parameters, for 600 steps on digits (98% of the documents), python (2% of the documents)",
        "no chat template",
        "CC BY 4.0",
        "PSF-2.0",
        "Apache-2.0",
        'Gemma4ForConditionalGeneration.from_pretrained("FOLDER")',
    ):
        assert part in text


def test_a_run_from_a_checkpoint():
    training = quickstart.get_config().to_dict()
    training["init"]["from_hf"] = "gemma-4-E2B"
    training["data"]["sources"] = {"mine": {"kind": "jsonl", "weight": 2.0}}
    text = card(sizes.quickstart(), FILES | {"chat_template.jinja"}, training)
    assert "from the weights of `gemma-4-E2B`" in text
    assert "mine (100% of the documents)" in text
    assert "no chat template" not in text
    assert "CC BY" not in text


def test_nothing_known_of_the_training():
    """As of a folder from `gemma4 convert`, whose config has no section about it."""
    for training in (None, {"model": {}, "tokenizer": "bundled", "data": {"soft_tokens_per_image": 70}}):
        assert "how it was trained is not known here" in card(sizes.quickstart(), training=training)


@pytest.mark.parametrize(("pooling", "said"), [(2, "not its images"), (3, "--image-max-tokens 70")])
def test_what_llama_cpp_makes_of_images(pooling, said):
    config = sizes.quickstart()
    vision = dataclasses.replace(config.vision, pooling_size=pooling)
    assert said in card(dataclasses.replace(config, vision=vision))
    text_only = dataclasses.replace(config, vision=None)
    assert "llama.cpp" not in card(text_only, is_text_only=True)
    assert "AutoModelForCausalLM" in card(text_only, is_text_only=True)
