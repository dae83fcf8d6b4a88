"""The reference implementation on small models: transformers and torch, on the CPU."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.models.gemma4 import Gemma4ForConditionalGeneration

from gemma4_jax.config import Gemma4Config
from gemma4_jax.hf.config import to_hf
from tests.hf import samples, sounds

MAX_SOFT_TOKENS = 70


def build(
    config: Gemma4Config, weights: Mapping[str, np.ndarray], dtype=torch.float32
) -> Gemma4ForConditionalGeneration:
    """The reference model with these weights."""
    content = to_hf(config, dtype="float32", max_soft_tokens=MAX_SOFT_TOKENS)
    hf_config = transformers.Gemma4Config(**content, attn_implementation="eager", experts_implementation="eager")
    model = Gemma4ForConditionalGeneration(hf_config)
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)
    model.tie_weights()
    return model.to(dtype).eval()


def inputs(documents: Sequence[samples.Segments], config: Gemma4Config) -> dict[str, torch.Tensor]:
    """Documents as the rows of a batch, padded on the right, as the reference's processor lays them out."""
    assert config.vision is not None
    examples = [samples.example(document, config) for document in documents]
    length = max(len(example.tokens) for example in examples)
    ids = np.zeros((len(examples), length), np.int64)
    mask = np.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.tokens)] = example.tokens
        mask[row, : len(example.tokens)] = 1
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == config.tokens.image).astype(np.int64),
    }
    images = [image for example in examples for image in example.images]
    if images:
        width = max(len(image.patches) for image in images)
        pixels = np.zeros((len(images), width, config.vision.patch_dim))
        positions = np.full((len(images), width, 2), -1, np.int64)
        for i, image in enumerate(images):
            # The reference has patches in raster order; ours come cell by cell.
            raster = np.lexsort((image.positions[:, 0], image.positions[:, 1]))
            pixels[i, : len(raster)] = image.patches[raster] / 255
            positions[i, : len(raster)] = image.positions[raster]
        given |= {"pixel_values": pixels, "image_position_ids": positions}
    if config.audio is not None:
        features, lengths = sounds.arrays(documents, config)
        if len(lengths):
            is_frame = np.arange(features.shape[1]) < lengths[:, None]
            given |= {"input_features": features, "input_features_mask": is_frame}
    return {name: torch.from_numpy(array) for name, array in given.items()}


def logits(
    model: Gemma4ForConditionalGeneration, documents: Sequence[samples.Segments], config: Gemma4Config
) -> list[np.ndarray]:
    """[T, V] logits of every document, padding cut off."""
    return logits_and_layers(model, documents, config)[0]


def layers(
    model: Gemma4ForConditionalGeneration, documents: Sequence[samples.Segments], config: Gemma4Config
) -> dict[str, list[np.ndarray]]:
    """[..., D] hidden states after every layer of each stack that the documents run through, padding left out."""
    return logits_and_layers(model, documents, config)[1]


def logits_and_layers(
    model: Gemma4ForConditionalGeneration, documents: Sequence[samples.Segments], config: Gemma4Config
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """What `logits` and `layers` give, of one batch of documents."""
    given = inputs(documents, config)
    is_token = given["attention_mask"].bool()
    kept = {"decoder": (model.model.language_model.layers, is_token)}
    if "pixel_values" in given:
        kept["vision"] = (model.model.vision_tower.encoder.layers, (given["image_position_ids"] >= 0).all(-1))
    if "input_features" in given:
        kept["audio"] = (model.model.audio_tower.layers, given["input_features_mask"][:, ::2][:, ::2])
    found: dict[str, list[np.ndarray]] = {name: [] for name in kept}

    def keep(name: str, mask: torch.Tensor) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            found[name].append((out[0] if isinstance(out, tuple) else out)[mask].float().numpy())

        return hook

    hooks = [layer.register_forward_hook(keep(name, mask)) for name, (stack, mask) in kept.items() for layer in stack]
    with torch.no_grad():
        out = model(**_cast(given, model.dtype), use_cache=False).logits.float()
    for hook in hooks:
        hook.remove()
    return [row[mask].numpy() for row, mask in zip(out, is_token, strict=True)], found


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Within it a float64 model computes in float64 also what the reference computes in float32 whatever its dtype."""
    softmax = torch.nn.functional.softmax

    def wide_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(x, dim)

    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch.nn.functional, "softmax", wide_softmax),
    ):
        yield


def _cast(given: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As a model of this dtype wants its arguments; pixels it casts itself, so they are no narrower than float32."""
    dtypes = {"pixel_values": torch.float64 if dtype == torch.float64 else torch.float32}
    return {
        name: tensor.to(dtypes.get(name, dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in given.items()
    }


def loss_and_gradients(
    model: Gemma4ForConditionalGeneration, documents: Sequence[samples.Segments], config: Gemma4Config
) -> tuple[float, dict[str, np.ndarray]]:
    """Mean cross entropy over the loss weights of the documents, and its gradient for every parameter by name.

    Parameters that the documents do not run through are left out.
    """
    model.zero_grad()
    rows = [samples.batch([[document]], config) for document in documents]
    total_weight = sum(row.loss_weights.sum() for row in rows)
    total = 0.0
    for document, row in zip(documents, rows, strict=True):  # one by one: padding is not its concern
        given = _cast(inputs([document], config), model.dtype)
        logits = model(**given, use_cache=False).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(row.targets[0]).long(), reduction="none")
        loss = (losses * torch.from_numpy(row.loss_weights[0])).sum() / total_weight
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.float().numpy() for name, p in model.named_parameters() if p.grad is not None}


def generate(
    model: Gemma4ForConditionalGeneration, document: samples.Segments, config: Gemma4Config, max_new_tokens: int
) -> list[int]:
    """The tokens that the reference writes after one prompt, greedily, whatever they are."""
    return wait_for_first(model, inputs([document], config), max_new_tokens)


def wait_for_first(model: Gemma4ForConditionalGeneration, given: Mapping[str, Any], max_new_tokens: int) -> list[int]:
    """`generate`, from the arguments of the reference for one prompt."""
    tensors = _cast({name: torch.as_tensor(array) for name, array in given.items()}, model.dtype)
    with torch.no_grad():
        out = model.generate(**tensors, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return out[0, tensors["input_ids"].shape[1] :].tolist()
