"""Gemma 4: embed, merge soft tokens, decode, project to the vocabulary. The one door for callers."""

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.batch import Batch
from gemma4_jax.config import Gemma4Config
from gemma4_jax.layers import Linear, rms_normalize
from gemma4_jax.ops.attention import Sites
from gemma4_jax.ops.gather import invert_rows, move_rows
from gemma4_jax.ops.cross_entropy import vocabulary_logits
from gemma4_jax.sharding import constrain
from gemma4_jax.text.attention import view_tokens
from gemma4_jax.text.decoder import Decoder
from gemma4_jax.text.embedding import Embedder, PerLayerEmbedder
from gemma4_jax.text.moe import RouterStats
from gemma4_jax.vision.tower import VisionTower


class Gemma4(nnx.Module):
    """A whole Gemma 4.

    Args of the constructor:
      config: the architecture.
      rngs: randomness of the initial parameters, stream "params".
      dtype: compute dtype.
      param_dtype: dtype in which parameters are stored.
      remat: what the stacks keep for the backward pass, a key of `layers.REMAT_POLICIES`.
    """

    def __init__(
        self,
        config: Gemma4Config,
        rngs: nnx.Rngs,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
    ):
        self.config = config
        text, vision = config.text, config.vision
        self.embedder = Embedder(rngs, text, dtype=dtype, param_dtype=param_dtype)
        self.per_layer_embedder = (
            PerLayerEmbedder(rngs, text, dtype=dtype, param_dtype=param_dtype) if text.per_layer_embed_dim else None
        )
        self.decoder = Decoder(rngs, text, param_dtype=param_dtype, remat_policy=remat)
        if vision is None:
            self.vision = None
        else:
            self.vision = VisionTower(rngs, vision, dtype=dtype, param_dtype=param_dtype, remat_policy=remat)
            self.image_projection = Linear(
                rngs, {"vision_embed": vision.embed_dim}, {"embed": text.embed_dim}, param_dtype=param_dtype
            )

    @property
    def embedding_table(self) -> nnx.Param:
        """[V, D], the token embedding and, transposed, the head."""
        return self.embedder.table

    def __call__(self, batch: Batch) -> jax.Array:
        """[B, T, V] float32 logits of the next token, soft-capped."""
        hidden, _ = self.hidden(batch)
        return vocabulary_logits(hidden, self.embedding_table[...], cap=self.config.text.final_logit_softcap)

    def hidden(self, batch: Batch) -> tuple[jax.Array, RouterStats | None]:
        """Final hidden states [B, T, D], and router statistics with a leading [L] axis where there are experts."""
        index = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
        sites = Sites(index, batch.segment_ids, batch.image_ids)
        view = view_tokens(self.config.text, batch.positions, sites, sites)
        x, per_layer = self.embed(batch)
        hidden, stats, _ = self.decoder(x, per_layer, view)
        return hidden, stats

    def embed(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Merged embeddings [B, T, D], and per-layer embeddings [L, B, T, Q] or None."""
        roles = self.config.tokens
        is_placeholder = (
            (batch.tokens == roles.image) | (batch.tokens == roles.audio) | (batch.tokens == roles.video)
        )
        tokens = jnp.where(is_placeholder, roles.pad, batch.tokens)
        x = self.embedder(tokens)
        if self.vision is not None and batch.patches.shape[1]:
            x = self._merge(x, self.soft_tokens(batch), batch.image_slots)
        x = constrain(x, "batch", "length", None)
        return x, None if self.per_layer_embedder is None else self.per_layer_embedder(tokens, x)

    def soft_tokens(self, batch: Batch) -> jax.Array:
        """[B, M, D] soft tokens of every image of every row, in order. Source: spec section 3, "Projection"."""
        assert self.vision is not None
        pooled = self.vision(batch.patches, batch.patch_positions, batch.image_patches)
        return self.image_projection(rms_normalize(pooled, self.vision.config.norm_eps).astype(pooled.dtype))

    def _merge(self, x: jax.Array, soft_tokens: jax.Array, image_slots: jax.Array) -> jax.Array:
        placed = move_rows(soft_tokens, image_slots, invert_rows(image_slots, soft_tokens.shape[1]))
        return jnp.where((image_slots >= 0)[..., None], placed, x)
