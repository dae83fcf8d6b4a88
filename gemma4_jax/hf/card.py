"""The model card of an export: what it is, how it was made, how it is loaded, and whose licences touch it."""

from collections.abc import Collection, Mapping
from typing import Any

from gemma4_jax.hf.config import is_text_only

LLAMA_CPP_POOLING = 3
"""Patches along a side of a soft token, in the one image path that llama.cpp has for Gemma 4."""

BUNDLED_DATA = {
    "digits": "scans of handwritten digits from Optical Recognition of Handwritten Digits, by E. Alpaydin and "
    "C. Kaynak, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licensed CC BY 4.0; composed into "
    "sheets of numbers",
    "python": "sources of Python's standard library, under the licence of Python (PSF-2.0)",
}
"""Kind of source -> what is to be said of it."""


def model_card(
    config: Mapping[str, Any], file_names: Collection[str], num_values: int, training: Mapping[str, Any] | None
) -> bytes:
    """The content of README.md.

    Args:
      config: of config.json.
      file_names: what lies beside it.
      num_values: numbers in all tensors.
      training: the config of the run that trained it; None where nothing is known of one.
    """
    parts = [
        "---\nlibrary_name: transformers\ntags: [gemma4, gemma4-jax]\n---",
        "# A Gemma 4 exported by gemma4-jax",
        _sizes(config, num_values),
        "## How it was made",
        _origin(training),
        "## How to load it",
        _loading(config),
        *_notes(config, file_names),
        "## Licences",
        _licences(training),
    ]
    return ("\n\n".join(parts) + "\n").encode()


def _sizes(config: Mapping[str, Any], num_values: int) -> str:
    text = config.get("text_config", config)
    rows = [
        ("parameters and buffers", f"{num_values:,}, stored as {config['dtype']}"),
        ("text decoder", _size_of(text)),
        ("vocabulary", f"{text['vocab_size']:,} tokens"),
        ("longest context", f"{text['max_position_embeddings']:,} tokens"),
    ]
    if text["enable_moe_block"]:
        rows.append(("experts", f"{text['num_experts']} in a layer, {text['top_k_experts']} for a token"))
    if vision := config.get("vision_config"):
        cell, budget = vision["pooling_kernel_size"], config["vision_soft_tokens_per_image"]
        rows.append(("vision tower", _size_of(vision)))
        rows.append(("images", f"at most {budget} soft tokens, each of {cell} x {cell} patches"))
    if audio := config.get("audio_config"):
        rows.append(("audio tower", _size_of(audio)))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _size_of(section: Mapping[str, Any]) -> str:
    layers = section["num_hidden_layers"]
    return f"{layers} layer{'s' * (layers != 1)} of width {section['hidden_size']}"


def _origin(training: Mapping[str, Any] | None) -> str:
    if training is None or not isinstance(train := training.get("train"), Mapping):
        return "Written from a model in memory or a converted checkpoint: how it was trained is not known here."
    init = training.get("init", {})
    begin = "from random parameters"
    if source := init.get("from_hf") or init.get("from_run"):
        begin = f"from the weights of `{source}`"
    weights = {name: source["weight"] for name, source in _sources(training).items()}
    total = sum(weights.values())
    shares = ", ".join(f"{name} ({weight / total:.0%} of the documents)" for name, weight in weights.items())
    return (
        f"Trained {begin}, for {train.get('num_steps')} steps on {shares}, in the run `{training.get('name')}`. "
        "What it can do is what that run taught it, and nobody has checked it for anything else."
    )


def _sources(training: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sources that a run draws from; none where that is not known."""
    sources = training["data"].get("sources", {}) if training else {}
    return {name: source for name, source in sources.items() if isinstance(source, Mapping) and source.get("weight")}


def _loading(config: Mapping[str, Any]) -> str:
    name = "AutoModelForCausalLM" if is_text_only(config) else "Gemma4ForConditionalGeneration"
    processor = "AutoProcessor" if config.get("vision_config") else "AutoTokenizer"
    return (
        f"```python\nfrom transformers import {processor}, {name}\n\n"
        f'model = {name}.from_pretrained("FOLDER")\nprocessor = {processor}.from_pretrained("FOLDER")\n```'
    )


def _notes(config: Mapping[str, Any], file_names: Collection[str]) -> list[str]:
    notes = []
    if not {"chat_template.jinja", "chat_template.json"} & set(file_names):
        notes.append("It has no chat template: give it text as it was trained on text, and not conversations.")
    if vision := config.get("vision_config"):
        budget, cell = config["vision_soft_tokens_per_image"], vision["pooling_kernel_size"]
        if cell != LLAMA_CPP_POOLING:
            notes.append(
                f"llama.cpp reads its text, and not its images: a soft token here is {cell} x {cell} patches, and "
                f"there always {LLAMA_CPP_POOLING} x {LLAMA_CPP_POOLING}."
            )
        else:
            notes.append(
                f"llama.cpp sizes images by bounds of its own: set `--image-max-tokens {budget}`, and give images that "
                "need little resizing."
            )
    return notes


def _licences(training: Mapping[str, Any] | None) -> str:
    kinds = {name: source.get("kind") for name, source in _sources(training).items()}
    known = [f"- {name}: {BUNDLED_DATA[kind]}." for name, kind in kinds.items() if kind in BUNDLED_DATA]
    return "\n".join(
        [
            "The architecture is that of Gemma 4, which Google publishes under Apache-2.0, as is gemma4-jax. Weights",
            "that began from a checkpoint keep its licence; of others only who trained them has a say. Data:",
            "",
            *known,
            "- everything else: as the licences of the documents that it was trained on say.",
        ]
    )
