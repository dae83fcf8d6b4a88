"""Token embeddings, and the per-layer embeddings of E2B and E4B."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import TextConfig
from gemma4_jax.layers import Linear, RMSNorm, normal_param, weight
from gemma4_jax.ops.matmul import Matrix, take
from gemma4_jax.stack import remat


def _look_up(table: Matrix, tokens: jax.Array, pad: int, dtype: jnp.dtype) -> jax.Array:
    """Rows of a [V, ...] table by [B, T] ids. To be looked up does not train the pad row, as in the reference."""
    rows = take(table, tokens, dtype)
    is_pad = jnp.expand_dims(tokens == pad, range(2, rows.ndim))
    return jnp.where(is_pad, jax.lax.stop_gradient(rows), rows)


class Embedder(nnx.Module):
    """The token embedding, tied to the head. `pad` is the id of the pad token."""

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, pad: int, dtype: jnp.dtype, param_dtype: jnp.dtype):
        self.pad = pad
        self.dtype = dtype
        self.table = normal_param(
            rngs,
            {"vocab": config.vocab_size, "embed": config.embed_dim},
            param_dtype,
            stddev=config.embed_dim**-0.5,
        )

    @jax.named_scope("embed")
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, T] ids -> [B, T, D], scaled by sqrt(D), which is first rounded to the compute dtype."""
        rows = _look_up(weight(self, "table"), tokens, self.pad, self.dtype)
        return rows * jnp.asarray(math.sqrt(rows.shape[-1]), self.dtype)


class PerLayerEmbedder(nnx.Module):
    """One small embedding per token and layer: looked up by token, plus projected from the merged embedding.

    `pad` is the id of the pad token. Source: docs/gemma4.md section 2, "Per-layer embeddings".

    Args of the constructor:
      remat_policy: what is kept of the projection for the backward pass, a key of `stack.REMAT_POLICIES`.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: TextConfig,
        *,
        pad: int,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        remat_policy: str = "none",
    ):
        self.pad = pad
        self.dtype = dtype
        self.remat_policy = remat_policy
        per_layer = {"layers": config.num_layers, "per_layer_embed": config.per_layer_embed_dim}
        # Beside the projection of the merged embedding, which is normalised to one, the table starts nearly silent.
        self.table = normal_param(rngs, {"vocab": config.vocab_size} | per_layer, param_dtype, stddev=0.02)
        self.projection = Linear(rngs, {"embed": config.embed_dim}, per_layer, param_dtype=param_dtype)
        self.norm = RMSNorm(
            {"per_layer_embed": config.per_layer_embed_dim}, eps=config.norm_eps, param_dtype=param_dtype
        )

    @jax.named_scope("per_layer_embed")
    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """Embeds.

        Args:
          tokens: [B, T] ids, with placeholders already replaced by the pad id.
          x: [B, T, D] merged embeddings, soft tokens included.
        Returns:
          [L, B, T, Q].
        """
        by_token = _look_up(weight(self, "table"), tokens, self.pad, self.dtype)
        by_token *= jnp.asarray(math.sqrt(by_token.shape[-1]), self.dtype)
        # Beside what the layers are given, a second [B, T, L, Q] would live until their backward pass is over.
        by_context = remat(self._by_context, self.remat_policy)(x)
        return jnp.moveaxis((by_context + by_token) * jnp.asarray(2**-0.5, self.dtype), 2, 0)

    def _by_context(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, L, Q]."""
        return self.norm(self.projection(x) * jnp.asarray(x.shape[-1] ** -0.5, self.dtype))
