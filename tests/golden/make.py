"""Writes the golden files beside it, from the reference implementation.

    python -m tests.golden.make

tensors.json has the name and shape of every tensor in the reference's models of the presets, layers of one shape on
one line. The others have what the reference makes of the small models and documents of tests/hf/samples.py, whose
weights come from a seed and are not stored: SIZE.npz what it computes, every fourth of the logits, generated.json what
it writes after each document, and features.npz the features of a sound.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from gemma4_jax.config import Gemma4Config
from gemma4_jax.hf.config import to_hf
from gemma4_jax.hf.names import abbreviate
from gemma4_jax.sizes import SIZES
from tests.hf import reference, samples, sounds

FOLDER = Path(__file__).parent


def reference_tensors(config: Gemma4Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that the reference stores of a model; the head is tied and not stored."""
    hf_config = transformers.Gemma4Config(**to_hf(config, dtype="float32", max_soft_tokens=280))
    with torch.device("meta"):
        model = transformers.Gemma4ForConditionalGeneration(hf_config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def write_tensors() -> None:
    content: dict[str, dict[str, list[int]]] = {}
    for size, make in SIZES.items():
        names: dict[tuple[int, ...], list[str]] = {}
        for name, shape in reference_tensors(make()).items():
            names.setdefault(shape, []).append(name)
        content[size] = {line: list(shape) for shape, group in names.items() for line in abbreviate(group)}
    lines = [
        f'"{size}": {{\n' + ",\n".join(f"{json.dumps(name)}: {shape}" for name, shape in sorted(group.items())) + "\n}"
        for size, group in content.items()
    ]
    (FOLDER / "tensors.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_sizes() -> None:
    for size in samples.GOLDEN:
        config = samples.variant(size)
        model = reference.build(config, samples.lively_weights(config))
        logits = np.concatenate(
            [rows for case in samples.cases(config).values() for rows in reference.logits(model, case, config)]
        )
        loss, gradients = reference.loss_and_gradients(model, samples.all_documents(config), config)
        np.savez_compressed(
            FOLDER / f"{size}.npz",
            logits=logits[:, :: samples.GOLDEN_STRIDE],
            loss=loss,
            names=sorted(gradients),
            gradients=[samples.summarize_gradient(name, gradients[name]) for name in sorted(gradients)],
        )


def write_generated() -> None:
    content = {}
    for size in samples.OFFICIAL_SIZES:
        config = samples.shrink(size)
        model = reference.build(config, samples.restless_weights(config))
        documents = samples.all_documents(config)
        content[size] = [reference.generate(model, document, config, samples.NEW_TOKENS) for document in documents]
    lines = [
        f'"{size}": [\n' + ",\n".join(json.dumps(tokens) for tokens in written) + "\n]"
        for size, written in content.items()
    ]
    (FOLDER / "generated.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_features() -> None:
    extractor = transformers.Gemma4AudioFeatureExtractor()
    (features,) = extractor([sounds.make(np.random.default_rng(3), 4000)], pad_to_multiple_of=None)["input_features"]
    np.savez_compressed(FOLDER / "features.npz", features=features)


if __name__ == "__main__":
    write_features()
    write_tensors()
    write_generated()
    write_sizes()
