"""One decoder layer, and the block of layers that makes one period of the attention pattern."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import TextConfig
from gemma4_jax.layers import Buffer, GatedMLP, Linear, RMSNorm, gelu
from gemma4_jax.sharding import constrain
from gemma4_jax.stack import remat
from gemma4_jax.text.attention import Attention, AttentionView, KeyValues
from gemma4_jax.text.moe import MixtureOfExperts, RouterStats


def _post_norm(config: TextConfig, param_dtype: jnp.dtype) -> RMSNorm:
    """The norm after a branch: at first, the 2 L branches of attention and MLP together add a variance of one."""
    return RMSNorm(
        {"embed": config.embed_dim},
        eps=config.norm_eps,
        param_dtype=param_dtype,
        initial_scale=(2 * config.num_layers) ** -0.5,
    )


class PerLayerInput(nnx.Module):
    """Adds a layer's own embedding of the token, gated by the residual stream.

    Source: docs/gemma4.md section 2, "Block".
    """

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, param_dtype: jnp.dtype):
        embed, per_layer = {"embed": config.embed_dim}, {"per_layer_embed": config.per_layer_embed_dim}
        self.gate = Linear(rngs, embed, per_layer, param_dtype=param_dtype)
        self.projection = Linear(rngs, per_layer, embed, param_dtype=param_dtype)
        self.post_norm = _post_norm(config, param_dtype)

    @jax.named_scope("per_layer_input")
    def __call__(self, x: jax.Array, per_layer_embedding: jax.Array) -> jax.Array:
        """x [B, T, D] and per_layer_embedding [B, T, Q] -> [B, T, D]."""
        return x + self.post_norm(self.projection(gelu(self.gate(x)) * per_layer_embedding))


class DecoderLayer(nnx.Module):
    """Attention, MLP (with experts beside it where the config says so), per-layer embedding, layer scalar."""

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, is_global: bool, shares_kv: bool, param_dtype: jnp.dtype):
        def norm() -> RMSNorm:
            return RMSNorm({"embed": config.embed_dim}, eps=config.norm_eps, param_dtype=param_dtype)

        is_wide = shares_kv and config.uses_double_wide_mlp
        self.attention = Attention(rngs, config, is_global=is_global, shares_kv=shares_kv, param_dtype=param_dtype)
        self.mlp = GatedMLP(
            rngs,
            {"embed": config.embed_dim},
            {"mlp": config.mlp_dim * (2 if is_wide else 1)},
            param_dtype=param_dtype,
        )
        self.pre_attention_norm = norm()
        self.post_attention_norm = _post_norm(config, param_dtype)
        self.pre_mlp_norm = norm()
        self.post_mlp_norm = _post_norm(config, param_dtype)
        self.moe = MixtureOfExperts(rngs, config, param_dtype=param_dtype) if config.num_experts else None
        self.per_layer_input = (
            PerLayerInput(rngs, config, param_dtype=param_dtype) if config.per_layer_embed_dim else None
        )
        self.layer_scalar = Buffer(jnp.ones((1,), param_dtype), axes=("scalar",))

    def __call__(
        self,
        x: jax.Array,
        per_layer_embedding: jax.Array | None,
        view: AttentionView,
        shared: KeyValues | None,
        cache: KeyValues | None,
    ) -> tuple[jax.Array, KeyValues, RouterStats | None]:
        """One layer.

        Args:
          x: [B, T, D] residual stream.
          per_layer_embedding: [B, T, Q], or None where the model has none.
          view, shared, cache: as in `Attention`.
        Returns:
          ([B, T, D], keys and values attended to, router statistics or None).
        """
        with jax.named_scope("global_attention" if self.attention.is_global else "sliding_attention"):
            attended, kv = self.attention(self.pre_attention_norm(x), view, shared, cache)
        x = x + self.post_attention_norm(attended)
        out = self.mlp(self.pre_mlp_norm(x))
        stats = None
        if self.moe is not None:
            out, stats = self.moe(x, out, view.is_token, view.experts)
        x = x + self.post_mlp_norm(out)
        if self.per_layer_input is not None:
            assert per_layer_embedding is not None
            x = self.per_layer_input(x, per_layer_embedding)
        x = x * self.layer_scalar[...].astype(x.dtype)
        return constrain(x, "batch", "length", None), kv, stats


class SharedKeyValues(NamedTuple):
    """Keys and values of the last own layer of each kind; `sliding_layer` is None where no layer slides."""

    sliding_layer: KeyValues | None
    global_layer: KeyValues

    def exchanged(self, view: AttentionView) -> "SharedKeyValues":
        """Of all devices, those that the queries of each may see."""
        sliding = self.sliding_layer
        with jax.named_scope("sliding_attention"):
            sliding = None if sliding is None else view.sliding_layer.exchanged(sliding)
        with jax.named_scope("global_attention"):
            return SharedKeyValues(sliding, view.global_layer.exchanged(self.global_layer))


class Block(nnx.Module):
    """One period of the attention pattern: sliding layers, then a global one. The unit that is stacked and scanned.

    Args of the constructor:
      shares_kv: has no K and V of its own; uses those it is given.
      remat_policy: what each of its layers keeps for the backward pass, a key of `stack.REMAT_POLICIES`.
    """

    def __init__(
        self, rngs: nnx.Rngs, config: TextConfig, *, shares_kv: bool, param_dtype: jnp.dtype, remat_policy: str
    ):
        self.remat_policy = remat_policy
        self.layers = nnx.List(
            DecoderLayer(rngs, config, is_global=config.is_global(layer), shares_kv=shares_kv, param_dtype=param_dtype)
            for layer in range(config.attention_period)
        )

    def __call__(
        self,
        x: jax.Array,
        per_layer_embeddings: jax.Array | None,
        view: AttentionView,
        shared: SharedKeyValues | None,
        caches: tuple[KeyValues, ...] | None,
    ) -> tuple[jax.Array, tuple[KeyValues, ...], RouterStats | None]:
        """One period.

        Args:
          x: [B, T, D] residual stream.
          per_layer_embeddings: [period, B, T, Q] or None.
          view: of the tokens.
          shared: keys and values for layers that share them.
          caches: one per layer, or None.
        Returns:
          ([B, T, D], keys and values of every layer, router statistics with a leading [period] axis or None).
        """
        key_values, stats = [], []
        for i, layer in enumerate(self.layers):
            per_layer = None if per_layer_embeddings is None else per_layer_embeddings[i]
            cache = None if caches is None else caches[i]
            own_kind = None
            if shared is not None:
                own_kind = shared.global_layer if layer.attention.is_global else shared.sliding_layer
            step = partial(layer, view=view, shared=own_kind, cache=cache)
            x, kv, layer_stats = remat(step, self.remat_policy)(x, per_layer)
            key_values.append(kv)
            stats.append(layer_stats)
        stacked = None if stats[0] is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
        return x, tuple(key_values), stacked
