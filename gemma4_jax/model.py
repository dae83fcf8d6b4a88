"""Gemma 4: embed, merge soft tokens, decode, project to the vocabulary. The one door for callers."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.audio.tower import NORM_EPS as AUDIO_NORM_EPS
from gemma4_jax.audio.tower import AudioTower
from gemma4_jax.batch import Batch
from gemma4_jax.config import Gemma4Config
from gemma4_jax.errors import InputError
from gemma4_jax.layers import Linear, rms_normalize, weight
from gemma4_jax.ops.attention import Shape
from gemma4_jax.ops.attention.context import swap_halves
from gemma4_jax.ops.cross_entropy import Head, vocabulary_logits
from gemma4_jax.ops.gather import invert_rows, move_rows
from gemma4_jax.ops.matmul import value
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import BATCH_AXES, constrain
from gemma4_jax.text.attention import view_tokens
from gemma4_jax.text.decoder import Decoder
from gemma4_jax.text.embedding import Embedder, PerLayerEmbedder
from gemma4_jax.text.moe import RouterStats
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS
from gemma4_jax.vision.tower import VisionTower

_ANYWHERE = KernelPolicy()
"""What runs on every platform."""


class Gemma4(nnx.Module):
    """A whole Gemma 4.

    Args of the constructor:
      config: the architecture.
      rngs: randomness of the initial parameters, stream "params".
      dtype: compute dtype.
      param_dtype: dtype in which parameters are stored.
      remat: what the stacks keep for the backward pass, a key of `stack.REMAT_POLICIES`.
      kernels: what computes attention and experts, and on which platform.
    """

    def __init__(
        self,
        config: Gemma4Config,
        rngs: nnx.Rngs,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        kernels: KernelPolicy = _ANYWHERE,
    ):
        self.config = config
        self.kernels = kernels
        text, vision, audio = config.text, config.vision, config.audio
        pad = config.tokens.pad
        self.embedder = Embedder(rngs, text, pad=pad, dtype=dtype, param_dtype=param_dtype)
        self.per_layer_embedder = (
            PerLayerEmbedder(rngs, text, pad=pad, dtype=dtype, param_dtype=param_dtype, remat_policy=remat)
            if text.per_layer_embed_dim
            else None
        )
        self.decoder = Decoder(rngs, text, param_dtype=param_dtype, remat_policy=remat)
        if vision is None:
            self.vision = None
        else:
            self.vision = VisionTower(rngs, vision, dtype=dtype, param_dtype=param_dtype, remat_policy=remat)
            self.image_projection = Linear(
                rngs, {"vision_embed": vision.embed_dim}, {"embed": text.embed_dim}, param_dtype=param_dtype
            )
        if audio is None:
            self.audio = None
        else:
            self.audio = AudioTower(rngs, audio, dtype=dtype, param_dtype=param_dtype, remat_policy=remat)
            self.audio_projection = Linear(
                rngs, {"audio_output": audio.output_dim}, {"embed": text.embed_dim}, param_dtype=param_dtype
            )

    @property
    def head(self) -> Head:
        """From hidden states to logits; its table is the token embedding."""
        return Head(value(weight(self.embedder, "table")), self.config.text.final_logit_softcap)

    def __call__(self, batch: Batch) -> jax.Array:
        """[B, T, V] float32 logits of the next token, soft-capped."""
        hidden, _ = self.hidden(batch)
        return vocabulary_logits(hidden, self.head)

    def hidden(self, batch: Batch) -> tuple[jax.Array, RouterStats | None]:
        """Final hidden states [B, T, D], and router statistics with a leading [L] axis where there are experts.

        Raises:
          InputError: rows or positions do not spread evenly over the mesh.
        """
        _check_spread(batch)
        length = batch.tokens.shape[1]
        index = jnp.broadcast_to(jnp.arange(length), batch.tokens.shape)
        view = view_tokens(
            self.config.text,
            batch,
            self.kernels,
            index=index,
            num_keys=length,
            image_tokens=image_tokens(self.config, batch.patches.shape[1]),
        )
        # The decoder alone has positions in the order that spreads its work evenly over `context`.
        x, per_layer = self.embed(batch.map_tokens(swap_halves))
        hidden, stats, _ = self.decoder(x, per_layer, view)
        return swap_halves(hidden), stats

    def embed(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Merged embeddings [B, T, D], and per-layer embeddings [L, B, T, Q] or None."""
        roles = self.config.tokens
        is_placeholder = (batch.tokens == roles.image) | (batch.tokens == roles.audio) | (batch.tokens == roles.video)
        tokens = jnp.where(is_placeholder, roles.pad, batch.tokens)
        x = self.embedder(tokens)
        if self.vision is not None and batch.patches.shape[1]:
            x = _merge(x, self.soft_tokens(batch), batch.image_slots)
        if self.audio is not None and batch.audio_features.shape[1]:
            x = _merge(x, self.audio_soft_tokens(batch), batch.audio_slots)
        x = constrain(x, "batch", "length", None)
        return x, None if self.per_layer_embedder is None else self.per_layer_embedder(tokens, x)

    @jax.named_scope("vision")
    def soft_tokens(self, batch: Batch) -> jax.Array:
        """[B, M, D] soft tokens of every image of every row, in order. Source: docs/gemma4.md section 3."""
        assert self.vision is not None
        pooled = self.vision(batch.patches, batch.patch_positions, batch.patch_image_ids, self.kernels)
        return self.image_projection(rms_normalize(pooled, self.vision.config.norm_eps).astype(pooled.dtype))

    @jax.named_scope("audio")
    def audio_soft_tokens(self, batch: Batch) -> jax.Array:
        """[B, F / 4, D] soft tokens of every row, where the frames of its sounds are (docs/gemma4.md section 4)."""
        assert self.audio is not None
        encoded = self.audio(batch.audio_features, batch.frame_sound_ids)
        return self.audio_projection(rms_normalize(encoded, AUDIO_NORM_EPS).astype(encoded.dtype))


def attention_shapes(config: Gemma4Config, *, tokens: int, patches: int) -> list[Shape]:
    """What attention computes for rows of so many tokens and patches: one shape for each kind of layer there is."""
    text, vision = config.text, config.vision
    shapes = [Shape(tokens, tokens, text.global_head_dim, ahead=0)]
    if text.attention_period > 1:
        ahead = 0 if not text.image_blocks_bidirectional else max(image_tokens(config, patches) - 1, 0)
        shapes.insert(0, Shape(tokens, tokens, text.head_dim, text.sliding_window - 1, ahead))
    return shapes if vision is None or not patches else [*shapes, Shape(patches, patches, vision.head_dim)]


def image_tokens(config: Gemma4Config, patches: int) -> int:
    """Most soft tokens that an image of a row may have: as many as the row's patches make, or the largest budget."""
    return 0 if config.vision is None else min(patches // config.vision.pooling_size**2, SOFT_TOKEN_BUDGETS[-1])


def _check_spread(batch: Batch) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    axes_of = {"rows": BATCH_AXES, "positions": ("context",)}
    for size, (what, axes) in zip(batch.tokens.shape, axes_of.items(), strict=True):
        shards = math.prod(mesh.shape.get(axis, 1) for axis in axes)
        if size % shards:
            raise InputError(
                f"a batch of {size} {what} does not spread over {shards} devices ({', '.join(axes)}): its {what} must "
                f"be a multiple of {shards}."
            )


def _merge(x: jax.Array, soft_tokens: jax.Array, slots: jax.Array) -> jax.Array:
    """x [B, T, D], with soft token slots[b, t] of [B, M, D] in place of x[b, t] where it is not -1."""
    placed = move_rows(soft_tokens, slots, invert_rows(slots, soft_tokens.shape[1]))
    return jnp.where((slots >= 0)[..., None], placed, x)
