"""Small models with lively weights and documents with images, in numpy: the same on every machine, without torch."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax import sizes
from gemma4_jax.audio.features import num_frame_places, num_soft_tokens
from gemma4_jax.batch import Batch
from gemma4_jax.config import Gemma4Config, SpecialTokens
from gemma4_jax.data.assemble import assemble
from gemma4_jax.data.example import Example
from gemma4_jax.data.images import ImagePatches, cut_patches
from gemma4_jax.data.pack import RowShape
from gemma4_jax.hf.names import Tensor, tensors
from gemma4_jax.model import Gemma4
from gemma4_jax.ops.cross_entropy import token_log_probs
from gemma4_jax.vision.geometry import resized_size
from tests.hf import sounds

OFFICIAL_SIZES = ("e2b", "e4b", "26b_a4b", "31b")
VARIANTS = (*OFFICIAL_SIZES, "e2b_audio", "e4b_audio")
"""The official sizes without audio tower, and those that have one with it."""
GOLDEN = (*OFFICIAL_SIZES, "e2b_audio")
"""Those of which there is a golden file; E4B hears as E2B does."""
VOCAB_SIZE = 160
GOLDEN_STRIDE = 4
"""Golden files hold every fourth logit."""
NEW_TOKENS = 20
"""Tokens that a golden file holds of each generation: more than a sliding window of 8 or 16."""
TOKENS = SpecialTokens(
    begin_image=148, image=150, end_image=151, begin_audio=149, audio=152, end_audio=153, video=154
)  # fmt: skip

Segments = Sequence[list[int] | np.ndarray]
"""A document: token ids; images, uint8 [height, width, 3] whose sides are whole cells; and sounds, floats [n]."""


def shrink(size: str, *, with_audio: bool = False) -> Gemma4Config:
    """An official size with smaller widths and depths, and every feature of it."""
    config = sizes.SIZES[size]()
    text, vision = config.text, config.vision
    assert vision is not None
    has_shared = text.num_kv_shared_layers > 0
    period = text.attention_period
    kv_heads = {"num_kv_heads": 2, "num_global_kv_heads": 1} if text.uses_k_eq_v else {}
    return dataclasses.replace(
        config,
        text=dataclasses.replace(
            text,
            vocab_size=VOCAB_SIZE,
            embed_dim=48,
            mlp_dim=40,
            num_layers=(4 if has_shared else 2) * period,
            num_kv_shared_layers=(2 if has_shared else 0) * period,
            num_heads=4,
            head_dim=16,
            global_head_dim=32,
            sliding_window=text.sliding_window // 64,  # 8 or 16
            per_layer_embed_dim=24 if text.per_layer_embed_dim else 0,
            num_experts=6 if text.num_experts else 0,
            num_experts_per_token=2 if text.num_experts else 0,
            expert_dim=12 if text.num_experts else 0,
            max_positions=512,
            **kv_heads,
        ),
        vision=dataclasses.replace(
            vision, embed_dim=32, mlp_dim=24, num_layers=2, num_heads=2, head_dim=16, patch_size=4, num_positions=640
        ),
        audio=config.audio
        and dataclasses.replace(
            config.audio, embed_dim=16, num_layers=2, num_heads=2, subsampling_channels=(8, 4), output_dim=24
        )
        if with_audio
        else None,
        tokens=TOKENS,
    )


def variant(name: str) -> Gemma4Config:
    """One of VARIANTS, shrunk."""
    return shrink(name.removesuffix("_audio"), with_audio=name.endswith("_audio"))


def lively_weights(config: Gemma4Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, float32, away from the values that would hide a mistake: no norm scale or layer
    scalar is 1, clip bounds are finite and bite, and activations keep their size through the layers."""
    weights = {}
    for tensor in tensors(config):
        if not tensor.is_redundant:
            rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
            weights[tensor.name] = _lively(rng, tensor.name, tensor.shape).astype(np.float32)
    return weights


def restless_weights(config: Gemma4Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Lively weights with a small token embedding: what the layers add decides the next token, and not, as the head
    is tied to the embedding, the last one, of which a model would write nothing but repetitions."""
    weights = lively_weights(config, seed)
    name = "model.language_model.embed_tokens.weight"
    return weights | {name: weights[name] * np.float32(0.02)}


def _lively(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    last = name.rsplit(".", 1)[-1]
    if last in ("input_min", "output_min"):
        return np.asarray(-rng.uniform(1.0, 2.0))
    if last in ("input_max", "output_max"):
        return np.asarray(rng.uniform(1.0, 2.0))
    if last == "layer_scalar":
        return rng.uniform(0.8, 1.5, shape)
    noise = rng.standard_normal(shape)
    if "q_norm" in name or "k_norm" in name:  # sharper attention would amplify rounding from layer to layer
        return 0.5 + 0.15 * noise
    if len(shape) == 1 and last != "std_bias":
        return 1 + 0.3 * noise
    if last == "position_embedding_table" or last == "std_bias":
        return 0.3 * noise
    if "embed_tokens" in name:
        return 3 * noise / np.sqrt(shape[-1])
    return noise / np.sqrt(shape[-1])


def ours(weights: Mapping[str, Any], config: Gemma4Config) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint as our parameters, by dotted path."""
    stacks: dict[str, list[Tensor]] = {}
    for tensor in tensors(config):
        if tensor.path is not None:
            stacks.setdefault(tensor.path, []).append(tensor)
    parameters = {}
    for path, stack in stacks.items():
        arrays = [
            tensor.to_ours(weights[tensor.name]) for tensor in sorted(stack, key=lambda tensor: tensor.index or 0)
        ]
        parameters[path] = arrays[0] if stack[0].index is None else np.stack(arrays)
    return parameters


def model(config: Gemma4Config, weights: Mapping[str, np.ndarray], **options: Any) -> Gemma4:
    """Our model with these weights, stored as float32."""
    abstract = nnx.eval_shape(lambda: Gemma4(config, nnx.Rngs(0), **options))
    arrays = ours(weights, config)
    graphdef, state = nnx.split(abstract)
    flat = [
        (path, variable.replace(jnp.asarray(arrays[".".join(map(str, path))])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def example(segments: Segments, config: Gemma4Config) -> Example:
    """A document as the data pipeline gives it; every text token but the first carries loss."""
    tokens: list[int] = []
    carries_loss: list[bool] = []
    images: list[ImagePatches] = []
    heard: list[np.ndarray] = []
    for segment in segments:
        is_text = isinstance(segment, list)
        if sounds.is_sound(segment):
            heard.append(sounds.features(segment, config))
            placeholders = [config.tokens.audio] * num_soft_tokens(len(heard[-1]))
            segment = [config.tokens.begin_audio, *placeholders, config.tokens.end_audio]
        elif not is_text:
            assert config.vision is not None
            cells = {"patch_size": config.vision.patch_size, "pooling_size": config.vision.pooling_size}
            images.append(cut_patches(segment, **cells))
            placeholders = [config.tokens.image] * images[-1].num_soft_tokens
            segment = [config.tokens.begin_image, *placeholders, config.tokens.end_image]
        tokens += segment
        carries_loss += [is_text] * len(segment)
    return Example(np.array(tokens, np.int32), np.array(carries_loss), tuple(images), "sample", tuple(heard))


def batch(rows: Sequence[Sequence[Segments]], config: Gemma4Config, *, length: int | None = None) -> Batch:
    """Rows of packed documents; as long as the longest needs, or `length`."""
    assert config.vision is not None
    examples = [[example(document, config) for document in row] for row in rows]
    images = [[image for document in row for image in document.images] for row in examples]
    sounds = [[sound for document in row for sound in document.sounds] for row in examples]
    shape = RowShape(
        tokens=length or max(sum(len(document.tokens) for document in row) for row in examples),
        images=max(map(len, images)),
        patches=max(sum(len(image.patches) for image in row) for row in images),
        patch_dim=config.vision.patch_dim,
        frames=max(sum(num_frame_places(len(sound)) for sound in row) for row in sounds),
        mel_bins=config.audio.num_mel_bins if config.audio else 0,
    )
    return assemble(examples, shape, config.tokens)


def cases(config: Gemma4Config) -> dict[str, list[Segments]]:
    """Documents by what they try, those about sounds where the model hears; those of one case make a padded batch."""
    rng = np.random.default_rng(7)

    def words(length: int) -> list[int]:
        return rng.integers(15, min(config.text.vocab_size, TOKENS.begin_image), length).tolist()

    def picture(rows: int, columns: int) -> np.ndarray:
        return image(rng, config, rows, columns)

    bos = config.tokens.bos
    if config.audio is not None:
        # Of 1, 20 and 48 soft tokens: less than a chunk of attention, two chunks, and four to the brim.
        short, middle, long = (sounds.make(rng, length) for length in (480, 12_640, 30_600))
        return {
            "one_sound": [[[bos, *words(4)], middle, words(6)]],
            "sounds_first_and_last": [[short, words(3), long]],
            "sound_and_image": [[[bos], picture(2, 3), words(2), middle, words(8)]],
            "padding": [[[bos, *words(9)]], [[bos], long, words(5)], [[bos, *words(3)], short, words(4)]],
        }
    return {
        "text": [[[bos, *words(6)]]],
        "longer_than_the_window": [[[bos, *words(50)]]],
        "one_image": [[[bos, *words(6)], picture(3, 4), words(12)]],
        "images": [[[bos], picture(2, 9), words(5), picture(5, 1), words(3), picture(1, 1), words(9)]],
        "image_first_and_last": [[picture(2, 3), words(4), picture(4, 2)]],
        "padding": [[[bos, *words(5)]], [[bos], picture(3, 3), words(20)], [[bos, *words(17)]]],
    }


def image(rng: np.random.Generator, config: Gemma4Config, rows: int, columns: int) -> np.ndarray:
    """An image of rows x columns soft tokens."""
    assert config.vision is not None
    cell = config.vision.patch_size * config.vision.pooling_size
    return rng.integers(0, 256, (rows * cell, columns * cell, 3)).astype(np.uint8)


def image_of_budget(config: Gemma4Config, budget: int) -> Segments:
    """A document with an image of 640 x 480 pixels as large as a budget of soft tokens allows."""
    assert config.vision is not None
    cells = {"patch_size": config.vision.patch_size, "pooling_size": config.vision.pooling_size}
    sides = resized_size(480, 640, max_soft_tokens=budget, **cells)
    pixels = np.random.default_rng(budget).integers(0, 256, (*sides, 3)).astype(np.uint8)
    return [[config.tokens.bos, 20, 21], pixels, [22, 23, 24]]


def all_documents(config: Gemma4Config) -> list[Segments]:
    """The documents of all cases, to be computed in one batch."""
    return [document for documents in cases(config).values() for document in documents]


@nnx.jit
def logits(model: Gemma4, rows: Batch) -> jax.Array:
    """[B, T, V], compiled."""
    return model(rows)


def gradient_function(model: Gemma4) -> Callable[[Batch], tuple[float, dict[str, np.ndarray]]]:
    """Rows -> mean cross entropy over their loss weights, as in training, and its gradient for every parameter by path.

    It compiles once for rows of one shape.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def compute(params: nnx.State, rows: Batch) -> Any:
        def loss(params: nnx.State) -> jax.Array:
            model = nnx.merge(graphdef, params, rest)
            hidden, _ = model.hidden(rows)
            log_probs = token_log_probs(hidden, model.head, rows.targets, chunk=rows.tokens.shape[1])
            return -jnp.sum(log_probs * rows.loss_weights) / jnp.sum(rows.loss_weights)

        return jax.value_and_grad(loss)(params)

    def loss_and_gradients(rows: Batch) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = compute(params, jax.tree.map(jnp.asarray, rows))
        flat = nnx.to_flat_state(gradients)
        return float(loss), {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}

    return loss_and_gradients


def loss_and_gradients(model: Gemma4, rows: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """`gradient_function`, for rows that come once."""
    return gradient_function(model)(rows)


def summarize_gradient(name: str, gradient: np.ndarray) -> tuple[float, float]:
    """Two numbers that tell gradients apart: the norm, and the projection on a random direction."""
    direction = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(gradient.shape)
    return float(np.linalg.norm(gradient)), float(np.sum(gradient * direction))
