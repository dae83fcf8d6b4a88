"""The decoder: one stack of blocks that own their keys and values, and one that reuses the last of them."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import TextConfig
from gemma4_jax.layers import RMSNorm
from gemma4_jax.stack import run_stack, stack_modules
from gemma4_jax.text.attention import AttentionView, KeyValues
from gemma4_jax.text.block import Block, SharedKeyValues
from gemma4_jax.text.moe import RouterStats

Cache = tuple[KeyValues, ...]
"""Key-value cache of the own stack: one KeyValues per layer of a period, leaves [own periods, B, S, K, H]."""


class Decoder(nnx.Module):
    """All layers and the final norm. Each stack is scanned, so compile time does not grow with depth."""

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, param_dtype: jnp.dtype, remat_policy: str):
        self.config = config
        self.num_own = config.num_own_layers // config.attention_period
        self.num_shared = config.num_kv_shared_layers // config.attention_period

        def build(rngs: nnx.Rngs, *, shares_kv: bool) -> Block:
            return Block(rngs, config, shares_kv=shares_kv, param_dtype=param_dtype, remat_policy=remat_policy)

        self.own = stack_modules(partial(build, shares_kv=False), rngs, self.num_own)
        self.shared = stack_modules(partial(build, shares_kv=True), rngs, self.num_shared) if self.num_shared else None
        self.final_norm = RMSNorm({"embed": config.embed_dim}, eps=config.norm_eps, param_dtype=param_dtype)

    @jax.named_scope("decoder")
    def __call__(
        self, x: jax.Array, per_layer_embeddings: jax.Array | None, view: AttentionView, cache: Cache | None = None
    ) -> tuple[jax.Array, RouterStats | None, Cache | None]:
        """All layers.

        Args:
          x: [B, T, D] merged embeddings.
          per_layer_embeddings: [L, B, T, Q] or None.
          view: of the tokens.
          cache: key-value cache to read and extend, or None.
        Returns:
          (hidden states after the final norm [B, T, D], router statistics with a leading [L] axis or None, the
          extended cache or None).
        """
        period = self.config.attention_period
        if per_layer_embeddings is not None:
            per_layer_embeddings = per_layer_embeddings.reshape(-1, period, *per_layer_embeddings.shape[1:])
        own_inputs, shared_inputs = (
            (None, None)
            if per_layer_embeddings is None
            else (per_layer_embeddings[: self.num_own], per_layer_embeddings[self.num_own :])
        )
        x, shared, stats, cache = self._run_own(x, own_inputs, view, cache)
        if self.shared is not None:
            x, shared_stats = self._run_shared(x, shared_inputs, view, shared)
            if stats is not None:
                stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), stats, shared_stats)
        if stats is not None:
            stats = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stats)
        return self.final_norm(x), stats, cache

    def _run_own(
        self, x: jax.Array, inputs: jax.Array | None, view: AttentionView, cache: Cache | None
    ) -> tuple[jax.Array, SharedKeyValues | None, RouterStats | None, Cache | None]:
        def step(block: Block, carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
            x, _ = carry
            per_layer, cache = inputs
            x, key_values, stats = block(x, per_layer, view, None, cache)
            # Carried rather than collected: only the last period's are wanted, and a carry keeps one copy.
            return (x, self._last_of_each_kind(key_values)), (stats, None if cache is None else key_values)

        first = x, self._no_key_values(x, cache)
        # A layer, not a whole period, is what is computed again at one time.
        (x, shared), (stats, cache) = run_stack(self.own, step, first, (inputs, cache), remat_policy="none")
        return x, shared, stats, cache

    def _no_key_values(self, x: jax.Array, cache: Cache | None) -> SharedKeyValues | None:
        """What the first period is given in place of an earlier one's: of the same shape, and not read."""
        if self.shared is None:
            return None
        config = self.config
        num_keys, dtype = (x.shape[1], x.dtype) if cache is None else (cache[-1].k.shape[2], cache[-1].k.dtype)

        def zeros(num_heads: int, head_dim: int) -> KeyValues:
            array = jnp.zeros((len(x), num_keys, num_heads, head_dim), dtype)
            return KeyValues(array, array)

        sliding = zeros(config.num_kv_heads, config.head_dim) if config.attention_period > 1 else None
        return SharedKeyValues(sliding, zeros(config.num_global_kv_heads, config.global_head_dim))

    def _last_of_each_kind(self, key_values: tuple[KeyValues, ...]) -> SharedKeyValues | None:
        if self.shared is None:
            return None
        return SharedKeyValues(key_values[-2] if len(key_values) > 1 else None, key_values[-1])

    def _run_shared(
        self, x: jax.Array, inputs: jax.Array | None, view: AttentionView, shared: SharedKeyValues | None
    ) -> tuple[jax.Array, RouterStats | None]:
        assert self.shared is not None
        assert shared is not None
        # Once for all layers.
        shared = shared.exchanged(view)

        def step(block: Block, x: jax.Array, inputs: jax.Array | None) -> tuple[jax.Array, RouterStats | None]:
            x, _, stats = block(x, inputs, view, shared, None)
            return x, stats

        return run_stack(self.shared, step, x, inputs, remat_policy="none")
