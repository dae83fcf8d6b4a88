"""THE table between the tensors of a Hugging Face checkpoint and the parameters of this package.

A row says what a tensor is called there, what it is called here, and how its axes correspond. Import and export both
follow it. Axis letters of the layouts: v vocabulary, d width of the stream, n query heads, k KV heads, h head dim,
f MLP width, e experts, x width of an expert, l layers, q per-layer width, w vision width, p patch, s position, a audio
width, o audio output, t taps and z channels of the depthwise convolution, i and u channels of the two others, b and c
their taps in time and frequency, y frequency bins left.

Source: docs/gemma4.md section 6, and the state dict that transformers 5.23 builds from each official config.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from gemma4_jax.config import AudioConfig, Gemma4Config, TextConfig, VisionConfig

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
"""The table of token embeddings, and the head, which is the same table and need not be stored."""


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      theirs: name of the tensor, below the prefix of its scope.
      ours: dotted path of the parameter, below the prefix of its scope; None where this package has no such
        parameter and the tensor is carried along unread.
      layout: axes there -> axes here; "(n h) d -> d n h" splits the first axis in two and moves d to the front. An
        axis written as a number has that size.
    """

    theirs: str
    ours: str | None
    layout: str


def _linear(theirs: str, ours: str | None, layout: str, *, is_clipped: bool) -> tuple[Row, ...]:
    """A linear map that is stored with its four bounds where it is clipped; it may be carried."""
    bounds = ("input_min", "input_max", "output_min", "output_max") if is_clipped else ()
    kernel = Row(f"{theirs}.linear.weight", None if ours is None else f"{ours}.kernel", layout)
    return kernel, *(Row(f"{theirs}.{bound}", None if ours is None else f"{ours}.{bound}", "->") for bound in bounds)


_TEXT = (
    Row("embed_tokens.weight", "embedder.table", "v d -> v d"),
    Row("norm.weight", "decoder.final_norm.scale", "d -> d"),
)

_TEXT_PER_LAYER = (
    Row("embed_tokens_per_layer.weight", "per_layer_embedder.table", "v (l q) -> v l q"),
    Row("per_layer_model_projection.weight", "per_layer_embedder.projection.kernel", "(l q) d -> d l q"),
    Row("per_layer_projection_norm.weight", "per_layer_embedder.norm.scale", "q -> q"),
)

_DECODER_LAYER = (
    Row("self_attn.q_proj.weight", "attention.q.kernel", "(n h) d -> d n h"),
    Row("self_attn.q_norm.weight", "attention.q_norm.scale", "h -> h"),
    Row("self_attn.o_proj.weight", "attention.o.kernel", "d (n h) -> n h d"),
    Row("input_layernorm.weight", "pre_attention_norm.scale", "d -> d"),
    Row("post_attention_layernorm.weight", "post_attention_norm.scale", "d -> d"),
    Row("pre_feedforward_layernorm.weight", "pre_mlp_norm.scale", "d -> d"),
    Row("post_feedforward_layernorm.weight", "post_mlp_norm.scale", "d -> d"),
    Row("mlp.gate_proj.weight", "mlp.gate.kernel", "f d -> d f"),
    Row("mlp.up_proj.weight", "mlp.up.kernel", "f d -> d f"),
    Row("mlp.down_proj.weight", "mlp.down.kernel", "d f -> f d"),
    Row("layer_scalar", "layer_scalar", "1 -> 1"),
)

_KEYS = (
    Row("self_attn.k_proj.weight", "attention.k.kernel", "(k h) d -> d k h"),
    Row("self_attn.k_norm.weight", "attention.k_norm.scale", "h -> h"),
)

_VALUES = (Row("self_attn.v_proj.weight", "attention.v.kernel", "(k h) d -> d k h"),)

_PER_LAYER_INPUT = (
    Row("per_layer_input_gate.weight", "per_layer_input.gate.kernel", "q d -> d q"),
    Row("per_layer_projection.weight", "per_layer_input.projection.kernel", "d q -> q d"),
    Row("post_per_layer_input_norm.weight", "per_layer_input.post_norm.scale", "d -> d"),
)

_EXPERTS = (
    Row("router.scale", "moe.router.scale", "d -> d"),
    Row("router.per_expert_scale", "moe.router.per_expert_scale", "e -> e"),
    Row("router.proj.weight", "moe.router.kernel", "e d -> d e"),
    Row("experts.gate_up_proj", "moe.experts.gate_up", "e (2 x) d -> e d 2 x"),
    Row("experts.down_proj", "moe.experts.down", "e d x -> e x d"),
    Row("pre_feedforward_layernorm_2.weight", "moe.pre_norm.scale", "d -> d"),
    Row("post_feedforward_layernorm_1.weight", "moe.dense_post_norm.scale", "d -> d"),
    Row("post_feedforward_layernorm_2.weight", "moe.post_norm.scale", "d -> d"),
)

_VISION = (
    Row("vision_tower.patch_embedder.input_proj.weight", "vision.patch_embed.kernel", "w p -> p w"),
    Row("vision_tower.patch_embedder.position_embedding_table", "vision.position_table", "2 s w -> 2 s w"),
    Row("embed_vision.embedding_projection.weight", "image_projection.kernel", "d w -> w d"),
)

_VISION_STANDARDIZES = (
    Row("vision_tower.std_bias", "vision.std_bias", "w -> w"),
    Row("vision_tower.std_scale", "vision.std_scale", "w -> w"),
)

_VISION_LAYER = (
    Row("self_attn.q_norm.weight", "attention.q_norm.scale", "h -> h"),
    Row("self_attn.k_norm.weight", "attention.k_norm.scale", "h -> h"),
    Row("input_layernorm.weight", "pre_attention_norm.scale", "w -> w"),
    Row("post_attention_layernorm.weight", "post_attention_norm.scale", "w -> w"),
    Row("pre_feedforward_layernorm.weight", "pre_mlp_norm.scale", "w -> w"),
    Row("post_feedforward_layernorm.weight", "post_mlp_norm.scale", "w -> w"),
)

_VISION_LAYER_LINEARS = (
    Row("self_attn.q_proj", "attention.q", "(n h) w -> w n h"),
    Row("self_attn.k_proj", "attention.k", "(n h) w -> w n h"),
    Row("self_attn.v_proj", "attention.v", "(n h) w -> w n h"),
    Row("self_attn.o_proj", "attention.o", "w (n h) -> n h w"),
    Row("mlp.gate_proj", "mlp.gate", "f w -> w f"),
    Row("mlp.up_proj", "mlp.up", "f w -> w f"),
    Row("mlp.down_proj", "mlp.down", "w f -> f w"),
)

_AUDIO = (
    Row("audio_tower.subsample_conv_projection.layer0.conv.weight", "audio.subsample.0.kernel", "i 1 b c -> b c 1 i"),
    Row("audio_tower.subsample_conv_projection.layer0.norm.weight", "audio.subsample.0.scale", "i -> i"),
    Row("audio_tower.subsample_conv_projection.layer1.conv.weight", "audio.subsample.1.kernel", "u i b c -> b c i u"),
    Row("audio_tower.subsample_conv_projection.layer1.norm.weight", "audio.subsample.1.scale", "u -> u"),
    Row(
        "audio_tower.subsample_conv_projection.input_proj_linear.weight",
        "audio.input_projection.kernel",
        "a (y u) -> y u a",
    ),
    Row("audio_tower.output_proj.weight", "audio.output.kernel", "o a -> a o"),
    Row("audio_tower.output_proj.bias", "audio.output_bias", "o -> o"),
    Row("embed_audio.embedding_projection.weight", "audio_projection.kernel", "d o -> o d"),
)

_AUDIO_LAYER = (
    Row("feed_forward1.pre_layer_norm.weight", "first_mlp.pre_norm.scale", "a -> a"),
    Row("feed_forward1.post_layer_norm.weight", "first_mlp.post_norm.scale", "a -> a"),
    Row("feed_forward2.pre_layer_norm.weight", "second_mlp.pre_norm.scale", "a -> a"),
    Row("feed_forward2.post_layer_norm.weight", "second_mlp.post_norm.scale", "a -> a"),
    Row("norm_pre_attn.weight", "pre_attention_norm.scale", "a -> a"),
    Row("norm_post_attn.weight", "post_attention_norm.scale", "a -> a"),
    Row("norm_out.weight", "final_norm.scale", "a -> a"),
    Row("self_attn.per_dim_scale", "attention.per_dim_scale", "h -> h"),
    Row("self_attn.relative_k_proj.weight", "attention.relative_k.kernel", "(n h) a -> a n h"),
    Row("lconv1d.depthwise_conv1d.weight", "convolution.kernel", "z 1 t -> t 1 z"),
    Row("lconv1d.pre_layer_norm.weight", "convolution.pre_norm.scale", "a -> a"),
    Row("lconv1d.conv_norm.weight", "convolution.norm.scale", "z -> z"),
)

_AUDIO_LAYER_LINEARS = (
    Row("feed_forward1.ffw_layer_1", "first_mlp.up", "f a -> a f"),
    Row("feed_forward1.ffw_layer_2", "first_mlp.down", "a f -> f a"),
    Row("feed_forward2.ffw_layer_1", "second_mlp.up", "f a -> a f"),
    Row("feed_forward2.ffw_layer_2", "second_mlp.down", "a f -> f a"),
    Row("self_attn.q_proj", "attention.q", "(n h) a -> a n h"),
    Row("self_attn.k_proj", "attention.k", "(n h) a -> a n h"),
    Row("self_attn.v_proj", "attention.v", "(n h) a -> a n h"),
    Row("self_attn.post", "attention.o", "a (n h) -> n h a"),
    Row("lconv1d.linear_start", "convolution.start", "(2 z) a -> a 2 z"),
    Row("lconv1d.linear_end", "convolution.end", "a z -> z a"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, and where it belongs here.

    Attributes:
      name: in the checkpoint.
      shape: in the checkpoint.
      path: dotted path of the parameter here; None if the tensor is carried unread.
      index: place on the parameter's leading "layers" axis; None if it has none.
      split: the shape, with joined axes apart.
      order: for each axis here, its place in `split`.
      is_redundant: K or V of a KV-shared layer, which no model uses, and released checkpoints hold all the same.
    """

    name: str
    shape: tuple[int, ...]
    path: str | None
    index: int | None
    split: tuple[int, ...]
    order: tuple[int, ...]
    is_redundant: bool = False

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape here, without the leading "layers" axis."""
        return tuple(self.split[axis] for axis in self.order)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """From the checkpoint's axes to ours; a view wherever `array` is contiguous."""
        return array.reshape(self.split).transpose(self.order)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """From our axes to the checkpoint's."""
        return array.transpose(np.argsort(self.order)).reshape(self.shape)


def tensors(config: Gemma4Config) -> tuple[Tensor, ...]:
    """Every tensor that a checkpoint of this architecture may hold. The tied head is not stored."""
    return tuple(_all_tensors(config))


def text_only_name(name: str) -> str:
    """What a tensor of the decoder is called in a checkpoint of the decoder alone."""
    return re.sub(r"^model\.language_model\.", "model.", name)


def full_name(name: str) -> str:
    """The inverse of `text_only_name`."""
    return re.sub(r"^model\.", "model.language_model.", name)


def abbreviate(names: Iterable[str]) -> list[str]:
    """Names that differ in one layer number only, written as one: "layers.{0-3,7}.layer_scalar"."""
    groups: dict[str, list[int]] = {}
    for name in names:
        layer = re.search(r"(?<=\.layers\.)\d{1,9}(?=\.)", name)
        if layer is None:
            groups[name] = []
        else:
            groups.setdefault(f"{name[: layer.start()]}{{}}{name[layer.end() :]}", []).append(int(layer[0]))
    return [group.replace("{}", f"{{{_ranges(layers)}}}") if layers else group for group, layers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _all_tensors(config: Gemma4Config) -> Iterator[Tensor]:
    yield from _text_tensors(config.text)
    for layer in range(config.text.num_layers):
        yield from _decoder_layer_tensors(config.text, layer)
    if config.vision is not None:
        yield from _vision_tensors(config.vision, config.text.embed_dim)
    if config.audio is not None:
        yield from _audio_tensors(config.audio, config.text.embed_dim)


def _text_tensors(text: TextConfig) -> Iterator[Tensor]:
    sizes = {"v": text.vocab_size, "d": text.embed_dim, "l": text.num_layers, "q": text.per_layer_embed_dim}
    for row in (*_TEXT, *(_TEXT_PER_LAYER if text.per_layer_embed_dim else ())):
        yield _tensor(row, sizes, theirs="model.language_model.")


def _decoder_layer_tensors(text: TextConfig, layer: int) -> Iterator[Tensor]:
    is_global, is_shared = text.is_global(layer), layer >= text.num_own_layers
    sizes = {
        "d": text.embed_dim,
        "n": text.num_heads,
        "k": text.num_global_kv_heads if is_global else text.num_kv_heads,
        "h": text.global_head_dim if is_global else text.head_dim,
        "f": text.mlp_dim * (2 if is_shared and text.uses_double_wide_mlp else 1),
        "q": text.per_layer_embed_dim,
        "e": text.num_experts,
        "x": text.expert_dim,
    }
    period, place = divmod(layer - text.num_own_layers if is_shared else layer, text.attention_period)
    theirs = f"model.language_model.layers.{layer}."
    ours = f"decoder.{'shared' if is_shared else 'own'}.layers.{place}."
    optional = (_PER_LAYER_INPUT if text.per_layer_embed_dim else ()) + (_EXPERTS if text.num_experts else ())
    for row in _DECODER_LAYER + optional:
        yield _tensor(row, sizes, theirs, ours, period)
    for row in _KEYS + (() if is_global and text.uses_k_eq_v else _VALUES):
        tensor = _tensor(row, sizes, theirs, ours, period)
        yield dataclasses.replace(tensor, path=None, is_redundant=True) if is_shared else tensor


def _vision_tensors(vision: VisionConfig, embed_dim: int) -> Iterator[Tensor]:
    sizes = {
        "d": embed_dim,
        "w": vision.embed_dim,
        "p": vision.patch_dim,
        "s": vision.num_positions,
        "n": vision.num_heads,
        "h": vision.head_dim,
        "f": vision.mlp_dim,
    }
    for row in _VISION + (_VISION_STANDARDIZES if vision.standardizes else ()):
        yield _tensor(row, sizes, theirs="model.")
    linears = [
        row for linear in _VISION_LAYER_LINEARS for row in _linear(*linear, is_clipped=vision.uses_clipped_linears)
    ]
    for layer in range(vision.num_layers):
        for row in (*_VISION_LAYER, *linears):
            yield _tensor(row, sizes, f"model.vision_tower.encoder.layers.{layer}.", "vision.layers.", layer)


def _audio_tensors(audio: AudioConfig, embed_dim: int) -> Iterator[Tensor]:
    first, second = audio.subsampling_channels
    sizes = {
        "d": embed_dim,
        "a": audio.embed_dim,
        "o": audio.output_dim,
        "i": first,
        "u": second,
        "y": audio.num_mel_bins // 4,
        "t": audio.conv_kernel_size,
        "n": audio.num_heads,
        "h": audio.head_dim,
        "f": 4 * audio.embed_dim,
        "z": audio.embed_dim,
        "b": 3,
        "c": 3,
    }
    for row in _AUDIO:
        yield _tensor(row, sizes, theirs="model.")
    linears = [
        row for linear in _AUDIO_LAYER_LINEARS for row in _linear(*linear, is_clipped=audio.uses_clipped_linears)
    ]
    for layer in range(audio.num_layers):
        for row in (*_AUDIO_LAYER, *linears):
            yield _tensor(row, sizes, f"model.audio_tower.layers.{layer}.", "audio.layers.", layer)


def _tensor(row: Row, sizes: Mapping[str, int], theirs: str, ours: str = "", index: int | None = None) -> Tensor:
    """Reads the layout of a row, with the sizes of its axes."""
    there, _, here = row.layout.partition("->")
    axes, split, shape = [], [], []
    for group in re.findall(r"\([^)]*\)|\S+", there):
        members = group.strip("()").split()
        extents = [int(axis) if axis.isdecimal() else sizes[axis] for axis in members]
        axes += members
        split += extents
        shape.append(int(np.prod(extents)))
    order = tuple(axes.index(axis) for axis in here.split()) if here.strip() else tuple(range(len(axes)))
    path = None if row.ours is None else ours + row.ours
    return Tensor(theirs + row.theirs, tuple(shape), path, index, tuple(split), order)
