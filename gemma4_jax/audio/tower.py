"""The audio tower of E2B and E4B: log-mel features in, a soft token for every 40 ms out.

Source: docs/gemma4.md section 4.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.audio.features import FRAMES_PER_SOFT_TOKEN
from gemma4_jax.config import AudioConfig
from gemma4_jax.layers import Linear, RMSNorm, constant_param, normal_param, weight
from gemma4_jax.ops.attention.spans import member_spans
from gemma4_jax.ops.matmul import value
from gemma4_jax.stack import run_stack, stack_modules

NORM_EPS = 1e-6
"""Epsilon of every norm of the tower."""

_MASKED = -1e9
_MAX_TIMESCALE = 10_000.0


class Subsample(nnx.Module):
    """A convolution that halves time and frequency, a layer norm over its channels, and ReLU."""

    def __init__(self, rngs: nnx.Rngs, in_channels: int, channels: int, *, param_dtype: jnp.dtype):
        taps = {"tap": 3, "mel": 3}
        self.kernel = normal_param(
            rngs,
            taps | {"in_channel": in_channels, "channel": channels},
            param_dtype,
            stddev=(9 * in_channels) ** -0.5,
        )
        self.scale = constant_param({"channel": channels}, param_dtype)

    def __call__(self, x: jax.Array, is_frame: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, F, M, channels before] and is_frame [B, F] -> the same of half the extents, rounded up."""
        x = jnp.where(is_frame[:, :, None, None], x, 0)
        x = jax.lax.conv_general_dilated(
            x,
            value(weight(self, "kernel")).astype(x.dtype),
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        centred = x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + NORM_EPS) * self.scale[...].astype(jnp.float32)
        return jax.nn.relu(normed).astype(x.dtype), is_frame[:, ::2]


class HalfStepMLP(nnx.Module):
    """x + weight * norm(down(silu(up(norm x)))), one of the two feed-forwards of a conformer layer."""

    def __init__(self, rngs: nnx.Rngs, config: AudioConfig, *, param_dtype: jnp.dtype):
        self.config = config
        embed, mlp = {"audio_embed": config.embed_dim}, {"mlp": 4 * config.embed_dim}
        self.up = _linear(rngs, config, embed, mlp, param_dtype)
        self.down = _linear(rngs, config, mlp, embed, param_dtype)
        self.pre_norm = _norm(config, param_dtype)
        self.post_norm = _norm(config, param_dtype)

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        limit = self.config.activation_clip
        out = self.down(jax.nn.silu(self.up(self.pre_norm(_clamp(x, limit)))))
        return x + self.post_norm(_clamp(out, limit)) * self.config.residual_weight


class AudioAttention(nnx.Module):
    """Attention of chunks of queries to the keys just around them, in float32, with relative positions.

    Queries are cut into chunks of c; a chunk sees its own keys, p before and r behind them: w = p + c + r.
    """

    def __init__(self, rngs: nnx.Rngs, config: AudioConfig, *, param_dtype: jnp.dtype):
        self.config = config
        embed = {"audio_embed": config.embed_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        self.q, self.k, self.v = (_linear(rngs, config, embed, heads, param_dtype) for _ in range(3))
        self.o = _linear(rngs, config, heads, embed, param_dtype)
        self.relative_k = Linear(rngs, embed, heads, param_dtype=param_dtype)
        self.per_dim_scale = nnx.Param(jnp.zeros(config.head_dim, param_dtype), axes=("head_dim",))

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x [B, T, A] and mask [B, T / c, c, w] of `_visible`, T whole chunks -> [B, T, A]."""
        config = self.config
        q, k, v = (project(x).astype(jnp.float32) for project in (self.q, self.k, self.v))
        per_dim = jax.nn.softplus(self.per_dim_scale[...].astype(jnp.float32))
        q = q * (config.head_dim**-0.5 / math.log(2)) * per_dim
        k = k * (math.log(1 + math.e) / math.log(2))

        encodings, places = _relative_positions(config)
        relative = self.relative_k(jnp.asarray(encodings, x.dtype)).astype(jnp.float32)
        relative = jnp.pad(relative, ((0, 1), (0, 0), (0, 0)))[places]  # [c, w, N, H]

        q = q.reshape(len(x), -1, config.attention_chunk_size, *q.shape[2:])
        k, v = _contexts(k, config), _contexts(v, config)
        logits = jnp.einsum("bicnh,biwnh->bincw", q, k) + jnp.einsum("bicnh,cwnh->bincw", q, relative)
        logits = jnp.tanh(logits / config.attention_logit_softcap) * config.attention_logit_softcap
        weights = jax.nn.softmax(jnp.where(mask[:, :, None], logits, _MASKED), axis=-1)
        out = jnp.einsum("bincw,biwnh->bicnh", weights, v)
        return self.o(out.reshape(*x.shape[:2], *out.shape[3:]).astype(x.dtype))


class LightConvolution(nnx.Module):
    """x + end(silu(norm(a causal depthwise convolution of a gated linear unit)))."""

    def __init__(self, rngs: nnx.Rngs, config: AudioConfig, *, param_dtype: jnp.dtype):
        self.config = config
        embed, wide = {"audio_embed": config.embed_dim}, {"conv": config.embed_dim}
        self.start = _linear(rngs, config, embed, {"gate_and_up": 2} | wide, param_dtype)
        self.kernel = normal_param(
            rngs,
            {"tap": config.conv_kernel_size, "in_channel": 1} | wide,
            param_dtype,
            stddev=config.conv_kernel_size**-0.5,
        )
        self.end = _linear(rngs, config, wide, embed, param_dtype)
        self.pre_norm = _norm(config, param_dtype)
        self.norm = RMSNorm(wide, eps=NORM_EPS, param_dtype=param_dtype)

    @jax.named_scope("convolution")
    def __call__(self, x: jax.Array, place: jax.Array) -> jax.Array:
        """x [B, T, A] and place [B, T] of each in its sound -> [B, T, A]."""
        both = self.start(self.pre_norm(x))
        gated = both[..., 0, :] * jax.nn.sigmoid(both[..., 1, :])
        # A sum of shifted copies: a grouped convolution of one channel a group is slow on every backend.
        kernel = value(weight(self, "kernel")).astype(gated.dtype).astype(jnp.float32)
        taps, length = len(kernel), x.shape[1]
        padded = jnp.pad(gated, ((0, 0), (taps - 1, 0), (0, 0)))
        # What lies farther back than the sound begins is another sound, and counts as silence.
        heard = (
            jnp.where(place[..., None] >= taps - 1 - tap, padded[:, tap : tap + length], 0) * kernel[tap, 0]
            for tap in range(taps)
        )
        mixed = functools.reduce(jnp.add, heard)
        mixed = _clamp(mixed.astype(x.dtype), self.config.activation_clip)
        return x + self.end(jax.nn.silu(self.norm(mixed)))


class ConformerLayer(nnx.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm."""

    def __init__(self, rngs: nnx.Rngs, config: AudioConfig, *, param_dtype: jnp.dtype):
        self.limit = config.activation_clip
        self.first_mlp = HalfStepMLP(rngs, config, param_dtype=param_dtype)
        self.attention = AudioAttention(rngs, config, param_dtype=param_dtype)
        self.convolution = LightConvolution(rngs, config, param_dtype=param_dtype)
        self.second_mlp = HalfStepMLP(rngs, config, param_dtype=param_dtype)
        self.pre_attention_norm = _norm(config, param_dtype)
        self.post_attention_norm = _norm(config, param_dtype)
        self.final_norm = _norm(config, param_dtype)

    def __call__(self, x: jax.Array, mask: jax.Array, place: jax.Array) -> jax.Array:
        x = self.first_mlp(x)
        attended = self.attention(self.pre_attention_norm(_clamp(x, self.limit)), mask)
        x = x + self.post_attention_norm(_clamp(attended, self.limit))
        x = self.second_mlp(self.convolution(x, place))
        return self.final_norm(_clamp(x, self.limit))


class AudioTower(nnx.Module):
    """Log-mel features to soft tokens, before their projection to the width of the decoder."""

    def __init__(
        self, rngs: nnx.Rngs, config: AudioConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, remat_policy: str
    ):
        self.config = config
        self.dtype = dtype
        self.remat_policy = remat_policy
        first, second = config.subsampling_channels
        self.subsample = nnx.List(
            Subsample(rngs, before, after, param_dtype=param_dtype) for before, after in ((1, first), (first, second))
        )
        embed, output = {"audio_embed": config.embed_dim}, {"audio_output": config.output_dim}
        left = {"mel": config.num_mel_bins // 4, "channel": second}
        self.input_projection = Linear(rngs, left, embed, param_dtype=param_dtype)
        self.layers = stack_modules(
            lambda rngs: ConformerLayer(rngs, config, param_dtype=param_dtype), rngs, config.num_layers
        )
        self.output = Linear(rngs, embed, output, param_dtype=param_dtype)
        self.output_bias = nnx.Param(jnp.zeros(config.output_dim, param_dtype), axes=("audio_output",))

    def __call__(self, features: jax.Array, sound_ids: jax.Array) -> jax.Array:
        """Encodes.

        Args:
          features: [B, F, M] log-mel features of sounds one after another, laid out as in a Batch; what belongs to no
            sound is not read.
          sound_ids: [B, F] int32, the sound that each frame belongs to; 0 is none.
        Returns:
          [B, F / 4, Do]; of a sound of n frames the first ceil(n / 4) are its soft tokens.
        """
        is_frame = sound_ids > 0
        x = features.astype(self.dtype)[..., None]
        for subsample in self.subsample:
            x, is_frame = subsample(x, is_frame)
        x = self.input_projection(x)
        length = x.shape[1]
        rest = -length % self.config.attention_chunk_size
        x = jnp.pad(x, ((0, 0), (0, rest), (0, 0)))
        sound_ids = jnp.pad(sound_ids[:, ::FRAMES_PER_SOFT_TOKEN], ((0, 0), (0, rest)))
        mask = _visible(sound_ids, self.config)
        place = jnp.arange(length + rest) - member_spans(sound_ids).start

        def step(layer: ConformerLayer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return layer(x, mask, place), None

        x, _ = run_stack(self.layers, step, x, remat_policy=self.remat_policy)
        return self.output(x[:, :length]) + self.output_bias[...].astype(x.dtype)


def _linear(
    rngs: nnx.Rngs, config: AudioConfig, inputs: dict[str, int], outputs: dict[str, int], param_dtype: jnp.dtype
) -> Linear:
    return Linear(rngs, inputs, outputs, param_dtype=param_dtype, is_clipped=config.uses_clipped_linears)


def _norm(config: AudioConfig, param_dtype: jnp.dtype) -> RMSNorm:
    return RMSNorm({"audio_embed": config.embed_dim}, eps=NORM_EPS, param_dtype=param_dtype)


def _clamp(x: jax.Array, limit: float) -> jax.Array:
    limit = min(limit, float(jnp.finfo(x.dtype).max))
    return jnp.clip(x, -limit, limit)


def _context(config: AudioConfig) -> tuple[int, int, int]:
    """(p, c, r): keys before the chunk, in it and behind it among which a query of the chunk looks."""
    return config.attention_context_left - 1, config.attention_chunk_size, config.attention_context_right


def _contexts(x: jax.Array, config: AudioConfig) -> jax.Array:
    """[B, T, ...] -> [B, T / c, w, ...]: what lies around each chunk, zero beyond both ends."""
    past, chunk, future = _context(config)
    starts = np.arange(0, x.shape[1], chunk)
    padded = jnp.pad(x, ((0, 0), (past, future), *((0, 0),) * (x.ndim - 2)))
    return padded[:, starts[:, None] + np.arange(past + chunk + future)]


def _visible(sound_ids: jax.Array, config: AudioConfig) -> jax.Array:
    """Which keys around its chunk each query sees: [B, T] -> [B, T / c, c, w] bool.

    A query sees p keys back, itself included, and r - 1 ahead: the window of the reference is one narrower at both
    ends than the context that it gathers.
    """
    past, chunk, future = _context(config)
    spans = member_spans(sound_ids, back=past - 1, ahead=max(future - 1, 0))
    start, stop = (bound.reshape(len(sound_ids), -1, chunk, 1) for bound in (spans.start, spans.stop))
    keys = jnp.arange(0, sound_ids.shape[1], chunk)[:, None, None] + jnp.arange(-past, chunk + future)
    return (keys >= start) & (keys < stop)


def _relative_positions(config: AudioConfig) -> tuple[np.ndarray, np.ndarray]:
    """How far a key is behind a query.

    Returns:
      ([R, A] sinusoidal encodings of the distances R - 1 to 0, [c, w] which of them stands for each query and key; R,
      a row of zeros behind the last, where none does).
    """
    past, chunk, future = _context(config)
    distances = np.arange((past + chunk + future) // 2, -1, -1, dtype=np.float32)
    half = config.embed_dim // 2
    timescales = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(_MAX_TIMESCALE) / max(half - 1, 1)))
    angles = distances[:, None] * timescales
    # The first key that a query of the chunk may see has the first encoding, the next one the second, and so on.
    places = np.arange(past + chunk + future) - np.arange(chunk)[:, None]
    is_encoded = (places >= 0) & (places < len(distances))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), np.where(is_encoded, places, len(distances))
