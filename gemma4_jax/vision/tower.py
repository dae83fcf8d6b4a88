"""The vision tower: packed patches of any aspect ratio in, pooled soft tokens out. Source: docs/gemma4.md section 3."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import VisionConfig
from gemma4_jax.layers import (
    Buffer,
    GatedMLP,
    Linear,
    RMSNorm,
    normal_param,
    rms_normalize,
    weight,
)
from gemma4_jax.ops.attention import Shape, attend, choose
from gemma4_jax.ops.attention.spans import Spans, member_spans
from gemma4_jax.ops.matmul import value
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.rope import rotary_angles, rotary_frequencies, rotate_2d
from gemma4_jax.sharding import constrain
from gemma4_jax.stack import run_stack, stack_modules

# Where a tower that is trained from nothing starts: patches first, where they are second, what the layers make of
# them last. With branches as loud as the patches it takes several times as many images to learn to read a digit.
_PATCH_GAIN = 2.0
_POSITION_STDDEV = 0.3
_BRANCH_SCALE = 0.1


class PatchView(NamedTuple):
    """What attention needs to know about the patches, made once for all layers.

    Attributes:
      angles: rotary angles by x and by y, [B, P, H / 4] each.
      spans: the patches of its own image, for each patch.
      implementation: that computes it, a key of `ops.attention.IMPLEMENTATIONS`.
    """

    angles: tuple[jax.Array, jax.Array]
    spans: Spans
    implementation: str


class VisionAttention(nnx.Module):
    """Full attention inside each image, with 2-D rotary positions."""

    def __init__(self, rngs: nnx.Rngs, config: VisionConfig, *, param_dtype: jnp.dtype):
        self.eps = config.norm_eps
        embed = {"vision_embed": config.embed_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}

        def linear(inputs: dict[str, int], outputs: dict[str, int]) -> Linear:
            return Linear(rngs, inputs, outputs, param_dtype=param_dtype, is_clipped=config.uses_clipped_linears)

        def norm(initial_scale: float) -> RMSNorm:
            return RMSNorm(
                {"head_dim": config.head_dim},
                eps=config.norm_eps,
                param_dtype=param_dtype,
                initial_scale=initial_scale,
            )

        self.q, self.k, self.v = (linear(embed, heads) for _ in range(3))
        self.o = linear(heads, embed)
        # The scale of attention is 1; the usual head_dim**-0.5 is where the norm of queries starts.
        self.q_norm = norm(config.head_dim**-0.5)
        self.k_norm = norm(1.0)

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, view: PatchView) -> jax.Array:
        angles = view.angles
        q = rotate_2d(self.q_norm(self.q(x)), angles)
        k = rotate_2d(self.k_norm(self.k(x)), angles)
        v = rms_normalize(self.v(x), self.eps).astype(x.dtype)
        return self.o(attend(q, k, v, view.spans, implementation=view.implementation))


class VisionLayer(nnx.Module):
    """One layer of the tower: attention and gated MLP, each between two norms."""

    def __init__(self, rngs: nnx.Rngs, config: VisionConfig, *, param_dtype: jnp.dtype):
        def norm(initial_scale: float = 1.0) -> RMSNorm:
            return RMSNorm(
                {"vision_embed": config.embed_dim},
                eps=config.norm_eps,
                param_dtype=param_dtype,
                initial_scale=initial_scale,
            )

        self.attention = VisionAttention(rngs, config, param_dtype=param_dtype)
        self.mlp = GatedMLP(
            rngs,
            {"vision_embed": config.embed_dim},
            {"mlp": config.mlp_dim},
            param_dtype=param_dtype,
            is_clipped=config.uses_clipped_linears,
        )
        self.pre_attention_norm = norm()
        self.post_attention_norm = norm(_BRANCH_SCALE)
        self.pre_mlp_norm = norm()
        self.post_mlp_norm = norm(_BRANCH_SCALE)

    def __call__(self, x: jax.Array, view: PatchView) -> jax.Array:
        x = x + self.post_attention_norm(self.attention(self.pre_attention_norm(x), view))
        return x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))


class VisionTower(nnx.Module):
    """Patches to soft tokens."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: VisionConfig,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        remat_policy: str,
    ):
        self.config = config
        self.dtype = dtype
        self.remat_policy = remat_policy
        embed = {"vision_embed": config.embed_dim}
        self.patch_embed = Linear(rngs, {"patch": config.patch_dim}, embed, param_dtype=param_dtype, gain=_PATCH_GAIN)
        self.position_table = normal_param(
            rngs, {"xy": 2, "position": config.num_positions} | embed, param_dtype, stddev=_POSITION_STDDEV
        )
        self.layers = stack_modules(
            lambda rngs: VisionLayer(rngs, config, param_dtype=param_dtype), rngs, config.num_layers
        )
        if config.standardizes:
            self.std_bias = Buffer(jnp.zeros(config.embed_dim, param_dtype), axes=("vision_embed",))
            self.std_scale = Buffer(jnp.ones(config.embed_dim, param_dtype), axes=("vision_embed",))

    def __call__(
        self, patches: jax.Array, positions: jax.Array, image_ids: jax.Array, policy: KernelPolicy
    ) -> jax.Array:
        """Encodes.

        Args:
          patches: [B, P, 3 * patch_size**2] uint8, cell by cell (see Batch).
          positions: [B, P, 2] int32 (x, y); (-1, -1) is padding.
          image_ids: [B, P] int32, the image that each patch belongs to; 0 is padding.
          policy: how attention is computed.
        Returns:
          [B, M, Dv] soft tokens, M = P / pooling_size**2; of padding they mean nothing.
        """
        is_patch = positions[..., 0] >= 0
        x = self._embed(patches, positions, is_patch)
        frequencies = rotary_frequencies(self.config.head_dim // 2, self.config.rope_theta)
        view = PatchView(
            (rotary_angles(positions[..., 0], frequencies), rotary_angles(positions[..., 1], frequencies)),
            member_spans(image_ids),
            choose(policy, Shape(x.shape[1], x.shape[1], self.config.head_dim)),
        )

        def step(layer: VisionLayer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return layer(x, view), None

        x, _ = run_stack(self.layers, step, x, remat_policy=self.remat_policy)
        return self._pool(jnp.where(is_patch[..., None], x, 0))

    def _embed(self, patches: jax.Array, positions: jax.Array, is_patch: jax.Array) -> jax.Array:
        # 2 (p / 255 - 0.5), but for whole numbers until the last step: nothing cancels, whatever the compiler does.
        pixels = (2 * patches.astype(jnp.float32) - 255) / 255
        # Whole on every device: the partitioner would rather move the patches of all to the channels of each.
        table = constrain(value(weight(self, "position_table")).astype(self.dtype), None, None, None)
        places = jnp.maximum(positions, 0)
        position = table[0][places[..., 0]] + table[1][places[..., 1]]
        return self.patch_embed(pixels.astype(self.dtype)) + jnp.where(is_patch[..., None], position, 0)

    def _pool(self, x: jax.Array) -> jax.Array:
        b, p, width = x.shape
        cell = self.config.pooling_size**2
        pooled = jnp.sum(x.reshape(b, p // cell, cell, width).astype(jnp.float32), axis=2) / cell
        # The reference casts the mean before it scales it in float32.
        pooled = pooled.astype(self.dtype).astype(jnp.float32) * math.sqrt(width)
        if self.config.standardizes:
            bias, scale = self.std_bias[...].astype(jnp.float32), self.std_scale[...].astype(jnp.float32)
            pooled = (pooled - bias) * scale
        return pooled.astype(self.dtype)
