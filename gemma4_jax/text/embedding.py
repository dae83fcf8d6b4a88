"""Token embeddings, and the per-layer embeddings of E2B and E4B."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import TextConfig
from gemma4_jax.layers import Linear, RMSNorm, normal_param


class Embedder(nnx.Module):
    """The token embedding, tied to the head."""

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype):
        self.dtype = dtype
        self.table = normal_param(rngs, {"vocab": config.vocab_size, "embed": config.embed_dim}, param_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, T] ids -> [B, T, D], scaled by sqrt(D), which is first rounded to the compute dtype."""
        rows = self.table[...][tokens].astype(self.dtype)
        return rows * jnp.asarray(math.sqrt(rows.shape[-1]), self.dtype)


class PerLayerEmbedder(nnx.Module):
    """One small embedding per token and layer: looked up by token, plus projected from the merged embedding.

    Source: spec section 2, "Per-layer embeddings".
    """

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype):
        self.dtype = dtype
        per_layer = {"layers": config.num_layers, "per_layer_embed": config.per_layer_embed_dim}
        self.table = normal_param(rngs, {"vocab": config.vocab_size} | per_layer, param_dtype)
        self.projection = Linear(rngs, {"embed": config.embed_dim}, per_layer, param_dtype=param_dtype)
        self.norm = RMSNorm({"norm": config.per_layer_embed_dim}, eps=config.norm_eps, param_dtype=param_dtype)

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """Embeds.

        Args:
          tokens: [B, T] ids, with placeholders already replaced by the pad id.
          x: [B, T, D] merged embeddings, soft tokens included.
        Returns:
          [L, B, T, Q].
        """
        by_token = self.table[...][tokens].astype(self.dtype)
        by_token *= jnp.asarray(math.sqrt(by_token.shape[-1]), self.dtype)
        by_context = self.norm(self.projection(x) * jnp.asarray(x.shape[-1] ** -0.5, self.dtype))
        return jnp.moveaxis((by_context + by_token) * jnp.asarray(2**-0.5, self.dtype), 2, 0)
