"""The architecture of a Gemma 4, as frozen dataclasses that cannot hold an impossible model.

Pure Python: importing this module does not import jax.
"""

import dataclasses
from typing import Any

from gemma4_jax.fields import require


def _require_positive(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > 0, f"{prefix}.{name}", getattr(config, name), "greater than 0")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text decoder (docs/gemma4.md section 2).

    Attributes:
      vocab_size: V, rows of the tied token embedding.
      embed_dim: D, width of the residual stream.
      mlp_dim: F, hidden width of the dense MLP.
      num_layers: L.
      attention_period: layers per period; the last of each period is global, the others slide.
      num_heads: N query heads, on every layer.
      num_kv_heads: K on sliding layers, and on global ones unless `uses_k_eq_v`.
      num_global_kv_heads: K on global layers when `uses_k_eq_v`; otherwise equal to `num_kv_heads`.
      head_dim: H on sliding layers.
      global_head_dim: H on global layers.
      sliding_window: keys a query of a sliding layer may see, itself included.
      uses_k_eq_v: global layers have no V projection; V is the raw K projection.
      num_kv_shared_layers: the last n layers reuse K and V of the last own layer of their kind.
      uses_double_wide_mlp: the MLP of KV-shared layers is 2F wide.
      per_layer_embed_dim: Q, width of per-layer embeddings; 0 switches them off.
      num_experts: E; 0 means no MoE block.
      num_experts_per_token: C, experts chosen per token.
      expert_dim: hidden width of one expert.
      image_blocks_bidirectional: soft tokens of one image see each other on sliding layers.
      max_positions: longest sequence the model is meant for.
      final_logit_softcap: cap c of c * tanh(logits / c); 0 switches it off.
      rope_theta: base of rotary frequencies on sliding layers.
      global_rope_theta: base of rotary frequencies on global layers.
      global_rope_fraction: share of the global head dim that is rotated.
      norm_eps: epsilon of every RMSNorm.
    Raises:
      InputError: on construction, if the fields do not describe a possible model.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    attention_period: int
    num_heads: int
    num_kv_heads: int
    num_global_kv_heads: int
    head_dim: int
    global_head_dim: int
    sliding_window: int
    uses_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    uses_double_wide_mlp: bool = False
    per_layer_embed_dim: int = 0
    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_dim: int = 0
    image_blocks_bidirectional: bool = False
    max_positions: int = 131072
    final_logit_softcap: float = 30.0
    rope_theta: float = 10_000.0
    global_rope_theta: float = 1_000_000.0
    global_rope_fraction: float = 0.25
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive(
            self, "model.text", "vocab_size", "embed_dim", "mlp_dim", "num_layers", "attention_period", "num_heads",
            "num_kv_heads", "num_global_kv_heads", "head_dim", "global_head_dim", "sliding_window", "max_positions",
            "rope_theta", "global_rope_theta", "norm_eps",
        )  # fmt: skip
        period = self.attention_period
        whole = f"a multiple of attention_period={period} (layers come in whole periods)"
        require(self.num_layers % period == 0, "model.text.num_layers", self.num_layers, whole)
        shared = self.num_kv_shared_layers
        require(
            shared % period == 0 and 0 <= shared < self.num_layers,
            "model.text.num_kv_shared_layers", shared, f"0 or {whole}, and less than num_layers={self.num_layers}",
        )  # fmt: skip
        for name in ("num_kv_heads", "num_global_kv_heads"):
            divides = self.num_heads % getattr(self, name) == 0
            require(divides, f"model.text.{name}", getattr(self, name), f"a divisor of num_heads={self.num_heads}")
        require(
            self.uses_k_eq_v or self.num_global_kv_heads == self.num_kv_heads,
            "model.text.num_global_kv_heads", self.num_global_kv_heads,
            f"num_kv_heads={self.num_kv_heads} unless uses_k_eq_v is set",
        )  # fmt: skip
        for name in ("head_dim", "global_head_dim"):
            require(getattr(self, name) % 2 == 0, f"model.text.{name}", getattr(self, name), "even, for rotary pairs")
        rotated = self.global_rope_fraction * self.global_head_dim / 2
        require(
            0 <= self.global_rope_fraction <= 1 and rotated == int(rotated),
            "model.text.global_rope_fraction", self.global_rope_fraction,
            f"between 0 and 1 and rotate whole pairs of global_head_dim={self.global_head_dim}",
        )  # fmt: skip
        for name in ("per_layer_embed_dim", "final_logit_softcap", "num_experts"):
            require(getattr(self, name) >= 0, f"model.text.{name}", getattr(self, name), "at least 0")
        if self.num_experts:
            _require_positive(self, "model.text", "expert_dim")
            require(
                1 <= self.num_experts_per_token <= self.num_experts,
                "model.text.num_experts_per_token", self.num_experts_per_token,
                f"between 1 and num_experts={self.num_experts}",
            )  # fmt: skip

    @property
    def num_own_layers(self) -> int:
        """Layers that project their own K and V."""
        return self.num_layers - self.num_kv_shared_layers

    def is_global(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, is a global-attention layer."""
        return (layer + 1) % self.attention_period == 0


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower (docs/gemma4.md section 3).

    Attributes:
      embed_dim: width of the tower.
      mlp_dim: hidden width of its MLP.
      num_layers: number of its layers.
      num_heads: attention heads; keys and values have as many.
      head_dim: H; a multiple of 4, because half is rotated by x and half by y.
      patch_size: side of a square patch in pixels.
      pooling_size: a soft token is the mean of pooling_size x pooling_size patches.
      num_positions: rows of each of the two position tables.
      uses_clipped_linears: linear maps clamp input and output to stored bounds.
      standardizes: soft tokens are shifted and scaled by stored statistics.
      rope_theta: base of the 2-D rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
    """

    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    patch_size: int = 16
    pooling_size: int = 3
    num_positions: int = 10240
    uses_clipped_linears: bool = False
    standardizes: bool = False
    rope_theta: float = 100.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive(
            self, "model.vision", "embed_dim", "mlp_dim", "num_layers", "num_heads", "head_dim", "patch_size",
            "pooling_size", "num_positions", "rope_theta", "norm_eps",
        )  # fmt: skip
        in_pairs = "a multiple of 4, for pairs in x and in y"
        require(self.head_dim % 4 == 0, "model.vision.head_dim", self.head_dim, in_pairs)

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: row, column, channel."""
        return 3 * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """The audio tower of E2B and E4B (docs/gemma4.md section 4).

    Attributes:
      embed_dim: width of the conformer.
      num_layers: number of conformer layers.
      num_heads: attention heads.
      subsampling_channels: output channels of the two stride-2 convolutions; the first is also the number of mel bins.
      conv_kernel_size: taps of the causal depthwise convolution.
      attention_chunk_size: queries per attention chunk.
      attention_context_left: one more than the keys a query sees to the left, itself included.
      attention_context_right: one more than the keys a query sees to the right; 0 is none.
      attention_logit_softcap: cap of the attention logits.
      residual_weight: weight of each half-step feed-forward.
      output_dim: width of the tower's output, before the projection to the decoder.
      activation_clip: activations are clamped to plus and minus this.
      uses_clipped_linears: linear maps clamp input and output to stored bounds.
    """

    embed_dim: int = 1024
    num_layers: int = 12
    num_heads: int = 8
    subsampling_channels: tuple[int, int] = (128, 32)
    conv_kernel_size: int = 5
    attention_chunk_size: int = 12
    attention_context_left: int = 13
    attention_context_right: int = 0
    attention_logit_softcap: float = 50.0
    residual_weight: float = 0.5
    output_dim: int = 1536
    activation_clip: float = 1e10
    uses_clipped_linears: bool = True

    def __post_init__(self) -> None:
        _require_positive(
            self, "model.audio", "embed_dim", "num_layers", "num_heads", "conv_kernel_size", "attention_chunk_size",
            "attention_logit_softcap", "output_dim", "activation_clip",
        )  # fmt: skip
        require(
            len(self.subsampling_channels) == 2
            and min(self.subsampling_channels) > 0
            and self.subsampling_channels[0] % 4 == 0,
            "model.audio.subsampling_channels", self.subsampling_channels,
            "two numbers greater than 0, the first a multiple of 4",
        )  # fmt: skip
        left, right = self.attention_context_left, self.attention_context_right
        require(left >= 2, "model.audio.attention_context_left", left, "at least 2, for a query to see itself")
        require(right >= 0, "model.audio.attention_context_right", right, "at least 0")
        require(self.embed_dim % 2 == 0, "model.audio.embed_dim", self.embed_dim, "even, for sines and cosines")
        require(
            self.embed_dim % self.num_heads == 0,
            "model.audio.num_heads", self.num_heads, f"a divisor of embed_dim={self.embed_dim}",
        )  # fmt: skip

    @property
    def head_dim(self) -> int:
        """H."""
        return self.embed_dim // self.num_heads

    @property
    def num_mel_bins(self) -> int:
        """Mel bins of the features. The reference sizes the tower's input by the channels of the first convolution."""
        return self.subsampling_channels[0]


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a role (docs/gemma4.md section 5)."""

    pad: int = 0
    eos: int = 1
    bos: int = 2
    begin_image: int = 255999
    image: int = 258880
    end_image: int = 258882
    begin_audio: int = 256000
    audio: int = 258881
    end_audio: int = 258883
    video: int = 258884


@dataclasses.dataclass(frozen=True)
class Gemma4Config:
    """A whole Gemma 4: a text decoder and, where present, a vision and an audio tower."""

    text: TextConfig
    vision: VisionConfig | None = None
    audio: AudioConfig | None = None
    tokens: SpecialTokens = SpecialTokens()

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self.tokens).items():
            require(
                0 <= value < self.text.vocab_size,
                f"model.tokens.{name}", value, f"a token id below model.text.vocab_size={self.text.vocab_size}",
            )  # fmt: skip
