"""`Gemma4Config` to and from the dictionary in a Hugging Face config.json.

What this package does not compute is refused rather than ignored. A field that is missing has the value that the
reference gives it. Pure Python: importing this module does not import jax.
Source: transformers 5.23, `models/gemma4/configuration_gemma4.py`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from gemma4_jax.config import AudioConfig, Gemma4Config, SpecialTokens, TextConfig, VisionConfig
from gemma4_jax.errors import InputError

ARCHITECTURE, MODEL_TYPE = "Gemma4ForConditionalGeneration", "gemma4"
TEXT_ARCHITECTURE, TEXT_MODEL_TYPE = "Gemma4ForCausalLM", "gemma4_text"
"""Those of the decoder alone, whose config.json has no sections."""

SLIDING, GLOBAL = "sliding_attention", "full_attention"
INIT_STDDEV = 0.02
MAX_LAYERS = 1024
"""A file that claims more layers than this is refused before any table is made of them."""

# Ours -> (theirs, the reference's default).
_TEXT = {
    "vocab_size": ("vocab_size", 262144),
    "embed_dim": ("hidden_size", 2304),
    "mlp_dim": ("intermediate_size", 9216),
    "num_layers": ("num_hidden_layers", 30),
    "num_heads": ("num_attention_heads", 8),
    "num_kv_heads": ("num_key_value_heads", 4),
    "head_dim": ("head_dim", 256),
    "sliding_window": ("sliding_window", 512),
    "uses_k_eq_v": ("attention_k_eq_v", False),
    "num_kv_shared_layers": ("num_kv_shared_layers", 0),
    "uses_double_wide_mlp": ("use_double_wide_mlp", False),
    "per_layer_embed_dim": ("hidden_size_per_layer_input", 256),
    "max_positions": ("max_position_embeddings", 131072),
    "norm_eps": ("rms_norm_eps", 1e-6),
}

_VISION = {
    "embed_dim": ("hidden_size", 768),
    "mlp_dim": ("intermediate_size", 3072),
    "num_layers": ("num_hidden_layers", 16),
    "num_heads": ("num_attention_heads", 12),
    "head_dim": ("head_dim", 64),
    "patch_size": ("patch_size", 16),
    "pooling_size": ("pooling_kernel_size", 3),
    "num_positions": ("position_embedding_size", 10240),
    "uses_clipped_linears": ("use_clipped_linears", False),
    "standardizes": ("standardize", False),
    "norm_eps": ("rms_norm_eps", 1e-6),
}

_AUDIO = {
    "embed_dim": ("hidden_size", 1024),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 8),
    "conv_kernel_size": ("conv_kernel_size", 5),
    "attention_chunk_size": ("attention_chunk_size", 12),
    "attention_context_left": ("attention_context_left", 13),
    "attention_context_right": ("attention_context_right", 0),
    "attention_logit_softcap": ("attention_logit_cap", 50.0),
    "residual_weight": ("residual_weight", 0.5),
    "output_dim": ("output_proj_dims", 1536),
    "activation_clip": ("gradient_clipping", 1e10),
    "uses_clipped_linears": ("use_clipped_linears", True),
}

_EXPERTS = {
    "num_experts": ("num_experts", 0),
    "num_experts_per_token": ("top_k_experts", 0),
    "expert_dim": ("moe_intermediate_size", 0),
}

# pad, eos and bos are in text_config, the others at the top.
_TOKENS = {
    "begin_image": ("boi_token_id", 255999),
    "image": ("image_token_id", 258880),
    "end_image": ("eoi_token_id", 258882),
    "begin_audio": ("boa_token_id", 256000),
    "audio": ("audio_token_id", 258881),
    "end_audio": ("eoa_token_index", 258883),
    "video": ("video_token_id", 258884),
}

# Fields that have one value in every model that this package computes.
_FIXED_TEXT = {
    "model_type": TEXT_MODEL_TYPE,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_FIXED_VISION = {"model_type": "gemma4_vision", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_FIXED_AUDIO = {
    "model_type": "gemma4_audio",
    "hidden_act": "silu",
    "attention_invalid_logits_value": -1e9,
    "rms_norm_eps": 1e-6,  # some norms of the reference have this value whatever the file says
}


def to_hf(config: Gemma4Config, *, dtype: str, max_soft_tokens: int, is_text_only: bool = False) -> dict[str, Any]:
    """The content of config.json.

    Args:
      config: the architecture.
      dtype: of the stored tensors, "float32" or "bfloat16".
      max_soft_tokens: budget of an image, which some servers look up here.
      is_text_only: whether the checkpoint is one of the decoder alone.
    """
    text = {"dtype": dtype, **_text_to_hf(config.text, config.tokens)}
    if is_text_only:
        return {"architectures": [TEXT_ARCHITECTURE], **text, **_to_theirs(config.tokens, _TOKENS)}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        # Said again, for readers that look for it here alone.
        "vocab_size": config.text.vocab_size,
        "text_config": text,
        "vision_config": config.vision and {"dtype": dtype, **_vision_to_hf(config.vision, max_soft_tokens)},
        "audio_config": config.audio and {"dtype": dtype, **_audio_to_hf(config.audio)},
        **_to_theirs(config.tokens, _TOKENS),
        "vision_soft_tokens_per_image": max_soft_tokens,
        "initializer_range": INIT_STDDEV,
        "tie_word_embeddings": True,
    }


def is_text_only(content: Any) -> bool:
    """Whether a config.json is of the decoder alone."""
    return isinstance(content, Mapping) and content.get("model_type") == TEXT_MODEL_TYPE


def from_hf(content: Any, tokens: SpecialTokens | None = None) -> Gemma4Config:
    """The architecture that a config.json describes.

    Args:
      content: what the file says; nothing about it is trusted.
      tokens: those of the tokenizer beside it. The file of a decoder alone names no tokens of images and sounds.
    Raises:
      InputError: it is not a Gemma 4, or is one that this package does not compute.
    """
    top = _Section(content, "")
    top.check("model_type", (MODEL_TYPE, TEXT_MODEL_TYPE), None)
    top.check("quantization_config", (None,), None)
    if is_text_only(content):
        top.check("architectures", ([TEXT_ARCHITECTURE], None), None)
        return Gemma4Config(_text_from_hf(top), tokens=SpecialTokens(**_text_only_tokens(top, tokens)))
    top.check("architectures", ([ARCHITECTURE], None), None)
    top.check("tie_word_embeddings", (True,), True)
    text, vision, audio = (top.section(f"{name}_config") for name in ("text", "vision", "audio"))
    if text is None:
        raise InputError("config.json has no text_config: it must describe a text decoder.")
    return Gemma4Config(
        text=_text_from_hf(text),
        vision=None if vision is None else _vision_from_hf(vision),
        audio=None if audio is None else _audio_from_hf(audio),
        tokens=SpecialTokens(**_tokens_from_hf(top, text)),
    )


def generation_config(tokens: SpecialTokens) -> dict[str, Any]:
    """The content of generation_config.json."""
    return {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}


class _Section:
    """A part of config.json, read with suspicion.

    Args of the constructor:
      content: a dictionary, if all is well.
      path: what the part is called in messages, with a dot behind it.
    """

    def __init__(self, content: Any, path: str) -> None:
        if not isinstance(content, Mapping):
            raise InputError(f"config.json: {path.rstrip('.') or 'all of it'} must be an object, not {content!r:.60}.")
        self._content = content
        self._path = path

    @property
    def names(self) -> frozenset[str]:
        """Names of its fields."""
        return frozenset(self._content)

    def refuse(self, name: str, accepted: str) -> InputError:
        """The error about a field."""
        value = f"{self._content.get(name)!r:.200}"
        return InputError(f"config.json: {self._path}{name}={value} is not supported: accepted is {accepted}.")

    def read(self, name: str, default: Any) -> Any:
        """The value of a field, which has the type of its default; a float may be written as a whole number."""
        value = self._content.get(name, default)
        kinds = (int, float) if type(default) is float else (type(default),)
        if type(value) not in kinds:
            raise self.refuse(name, f"a value of type {type(default).__name__}")
        try:
            return type(default)(value)
        except OverflowError:
            raise self.refuse(name, "a number that a float can hold") from None

    def optional(self, name: str, default: Any) -> Any:
        """As `read`, but a field that is null or missing is None."""
        return None if self._content.get(name) is None else self.read(name, default)

    def section(self, name: str) -> "_Section | None":
        """A section inside this one; None if it is null or missing."""
        content = self._content.get(name)
        return None if content is None else _Section(content, f"{self._path}{name}.")

    def check(self, name: str, accepted: Collection[Any], default: Any) -> Any:
        """The value of a field, which must be one of those accepted."""
        value = self._content.get(name, default)
        if not any(value == other and type(value) is type(other) for other in accepted):
            raise self.refuse(name, " or ".join("null" if other is None else repr(other) for other in accepted))
        return value

    def check_fixed(self, fixed: Mapping[str, Any]) -> None:
        """Checks the fields that have one value in every model that this package computes."""
        for name, value in fixed.items():
            self.check(name, (value,), value)

    def to_ours(self, fields: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
        """Fields by our names."""
        values = {ours: self.read(theirs, default) for ours, (theirs, default) in fields.items()}
        if not 0 < values.get("num_layers", 1) <= MAX_LAYERS:
            raise self.refuse("num_hidden_layers", f"1 to {MAX_LAYERS}")
        return values


def _to_theirs(config: Any, fields: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for ours, (theirs, _) in fields.items()}


def _tokens_from_hf(top: _Section, text: _Section) -> dict[str, int]:
    try:
        eos = text.read("eos_token_id", 1)
    except InputError:
        # Where several tokens end a generation, the first ends a document.
        eos = next(iter(text.read("eos_token_id", [])), None)
        if type(eos) is not int:
            raise text.refuse("eos_token_id", "a token id, or a list of them") from None
    return {
        "pad": text.read("pad_token_id", 0),
        "eos": eos,
        "bos": text.read("bos_token_id", 2),
        **top.to_ours(_TOKENS),
    }


def _text_only_tokens(text: _Section, tokens: SpecialTokens | None) -> dict[str, int]:
    """Tokens by role, where only those of text must be in the file."""
    unnamed = {ours for ours, (theirs, _) in _TOKENS.items() if theirs not in text.names}
    found = _tokens_from_hf(text, text)
    if tokens is not None:
        return found | {ours: getattr(tokens, ours) for ours in unnamed}
    if any(found[ours] >= text.read("vocab_size", 262144) for ours in unnamed):
        raise InputError("config.json names no tokens of images and sounds: put the model's tokenizer.json beside it.")
    return found


def _text_to_hf(text: TextConfig, tokens: SpecialTokens) -> dict[str, Any]:
    layers = range(text.num_layers)
    global_layer = {"head_dim": text.global_head_dim, "num_key_value_heads": text.num_global_kv_heads}
    return {
        **_FIXED_TEXT,
        **_to_theirs(text, _TEXT),
        **(_to_theirs(text, _EXPERTS) if text.num_experts else {theirs: None for theirs, _ in _EXPERTS.values()}),
        "layer_types": [GLOBAL if text.is_global(layer) else SLIDING for layer in layers],
        # Said twice: transformers writes the first form, and every other reader knows the second.
        "per_layer_config": {str(layer): global_layer for layer in layers if text.is_global(layer)},
        "global_head_dim": text.global_head_dim,
        "num_global_key_value_heads": text.num_global_kv_heads if text.uses_k_eq_v else None,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": text.rope_theta},
            GLOBAL: {
                "rope_type": "proportional",
                "rope_theta": text.global_rope_theta,
                "partial_rotary_factor": text.global_rope_fraction,
            },
        },
        "vocab_size_per_layer_input": text.vocab_size,
        "final_logit_softcapping": text.final_logit_softcap or None,
        "use_bidirectional_attention": "vision" if text.image_blocks_bidirectional else None,
        "enable_moe_block": text.num_experts > 0,
        "pad_token_id": tokens.pad,
        "eos_token_id": tokens.eos,
        "bos_token_id": tokens.bos,
        "attention_dropout": 0.0,
        "initializer_range": INIT_STDDEV,
        "use_cache": True,
    }


def _text_from_hf(text: _Section) -> TextConfig:
    text.check_fixed(_FIXED_TEXT)
    fields = text.to_ours(_TEXT)
    if fields["per_layer_embed_dim"]:
        text.check("vocab_size_per_layer_input", (fields["vocab_size"],), 262144)
    if text.read("enable_moe_block", False):
        fields |= text.to_ours(_EXPERTS)
        if fields["num_experts"] < 1:
            raise text.refuse("num_experts", "at least 1 where enable_moe_block is set")
    fields["attention_period"] = period = _attention_period(text, fields["num_layers"])
    fields |= _global_heads(text, fields, set(range(period - 1, fields["num_layers"], period)))
    fields |= _text_rope(text.section("rope_parameters") or _Section({}, ""))
    return TextConfig(
        **fields,
        image_blocks_bidirectional=text.check("use_bidirectional_attention", ("vision", None), None) == "vision",
        final_logit_softcap=text.optional("final_logit_softcapping", 0.0) or 0.0,
    )


def _attention_period(text: _Section, num_layers: int) -> int:
    """The period of the list of layer types, whose last layer is global whatever the list says."""
    kinds = text.optional("layer_types", [])
    if kinds is None:
        kinds = [SLIDING if (layer + 1) % 6 else GLOBAL for layer in range(num_layers)]
    if len(kinds) != num_layers:
        raise text.refuse("layer_types", f"a list of num_hidden_layers={num_layers} layer types")
    kinds = [*kinds[:-1], GLOBAL]
    period = kinds.index(GLOBAL) + 1
    if kinds != [SLIDING if (layer + 1) % period else GLOBAL for layer in range(num_layers)]:
        raise text.refuse("layer_types", f"some {SLIDING!r} and one {GLOBAL!r}, the same again and again")
    return period


def _global_heads(text: _Section, fields: Mapping[str, Any], global_layers: set[int]) -> dict[str, int]:
    """Head dim and KV heads of global layers, in either of the two forms of `_text_to_hf`."""
    if "per_layer_config" not in text.names:
        num_kv_heads = text.optional("num_global_key_value_heads", 0) if fields["uses_k_eq_v"] else None
        return {
            "global_head_dim": text.read("global_head_dim", 512),
            "num_global_kv_heads": fields["num_kv_heads"] if num_kv_heads is None else num_kv_heads,
        }
    heads = {"global_head_dim": ("head_dim", fields["head_dim"])}
    heads |= {"num_global_kv_heads": ("num_key_value_heads", fields["num_kv_heads"])}
    layers = text.section("per_layer_config") or _Section({}, "")
    accepted = "the same head_dim and num_key_value_heads for every global layer"
    given = []
    for name in layers.names:
        layer = layers.section(name)
        if layer is None or not layer.names <= {"head_dim", "num_key_value_heads"}:
            raise text.refuse("per_layer_config", accepted)
        given.append(layer.to_ours(heads))
    numbers = {int(name) if name.isdecimal() and len(name) < 9 else -1 for name in layers.names}
    if numbers != (global_layers if given else set()) or any(layer != given[0] for layer in given):
        raise text.refuse("per_layer_config", accepted)
    return given[0] if given else {ours: default for ours, (_, default) in heads.items()}


def _text_rope(rope: _Section) -> dict[str, float]:
    sliding, global_ = (rope.section(kind) for kind in (SLIDING, GLOBAL))
    found: dict[str, float] = {}
    if sliding is not None:
        sliding.check("rope_type", ("default",), "default")
        found["rope_theta"] = sliding.read("rope_theta", 10_000.0)
    if global_ is not None:
        is_whole = global_.check("rope_type", ("proportional", "default"), "default") == "default"
        global_.check("factor", (1.0, None), None)
        found["global_rope_theta"] = global_.read("rope_theta", 1_000_000.0)
        found["global_rope_fraction"] = 1.0 if is_whole else global_.read("partial_rotary_factor", 1.0)
    return found


def _vision_to_hf(vision: VisionConfig, max_soft_tokens: int) -> dict[str, Any]:
    return {
        **_FIXED_VISION,
        **_to_theirs(vision, _VISION),
        "num_key_value_heads": vision.num_heads,
        # Versions of transformers from 5.17 on call it "axial", and read this name as well.
        "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        "default_output_length": max_soft_tokens,
        "attention_dropout": 0.0,
        "initializer_range": INIT_STDDEV,
    }


def _vision_from_hf(vision: _Section) -> VisionConfig:
    vision.check_fixed(_FIXED_VISION)
    fields = vision.to_ours(_VISION)
    vision.check("num_key_value_heads", (fields["num_heads"],), 12)
    rope = vision.section("rope_parameters") or _Section({}, "")
    rope.check("rope_type", ("axial", "default"), "axial")
    return VisionConfig(**fields, rope_theta=rope.read("rope_theta", 100.0))


def _audio_to_hf(audio: AudioConfig) -> dict[str, Any]:
    channels = {"subsampling_conv_channels": list(audio.subsampling_channels)}
    return {**_FIXED_AUDIO, **_to_theirs(audio, _AUDIO), **channels, "initializer_range": INIT_STDDEV}


def _audio_from_hf(audio: _Section) -> AudioConfig:
    audio.check_fixed(_FIXED_AUDIO)
    channels = audio.read("subsampling_conv_channels", [128, 32])
    if len(channels) != 2 or not all(type(channel) is int and channel > 0 for channel in channels):
        raise audio.refuse("subsampling_conv_channels", "two whole numbers")
    return AudioConfig(**audio.to_ours(_AUDIO), subsampling_channels=(channels[0], channels[1]))
