"""Self-attention of the decoder: grouped queries, normalised and rotated; sliding or global; K and V own or shared."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.batch import Batch
from gemma4_jax.config import TextConfig
from gemma4_jax.layers import Linear, RMSNorm, rms_normalize
from gemma4_jax.ops import expert_parallel
from gemma4_jax.ops.attention import Shape, attend, choose
from gemma4_jax.ops.attention.context import Exchange, exchange_for, swap_halves
from gemma4_jax.ops.attention.spans import Spans, text_spans
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.rope import rotary_angles, rotary_frequencies, rotate
from gemma4_jax.sharding import constrain


class KeyValues(NamedTuple):
    """Keys (normalised, rotated) and values of one layer, [B, S, K, H] each."""

    k: jax.Array
    v: jax.Array


class LayerView(NamedTuple):
    """What attention of one kind (sliding or global) needs to know about the tokens.

    Attributes:
      angles: [B, T, H / 2] rotary angles of the queries.
      key_angles: [B, S, H / 2] those of the keys of a row, in their natural order.
      spans: the keys that each query sees.
      implementation: that computes it, a key of `ops.attention.IMPLEMENTATIONS`.
      exchange: of keys, where positions are spread over devices.
    """

    angles: jax.Array
    key_angles: jax.Array
    spans: Spans
    implementation: str
    exchange: Exchange | None

    def exchanged(self, kv: KeyValues) -> KeyValues:
        """Of keys and values of all devices, those that the queries of each may see."""
        return kv if self.exchange is None else KeyValues(self.exchange(kv.k), self.exchange(kv.v))


class AttentionView(NamedTuple):
    """What the layers need to know about the tokens, made once for all of them.

    Attributes:
      places: [B, T] int32, of each token among the keys.
      is_token: [B, T] bool, False on padding.
      sliding_layer, global_layer: what attention of each kind of layer needs.
      experts: how they are computed.
    """

    places: jax.Array
    is_token: jax.Array
    sliding_layer: LayerView
    global_layer: LayerView
    experts: expert_parallel.ExpertPlan


def view_tokens(
    config: TextConfig,
    batch: Batch,
    policy: KernelPolicy,
    *,
    index: jax.Array,
    num_keys: int,
    image_tokens: int | None = None,
) -> AttentionView:
    """Rotary angles and spans of the tokens of a batch, in the order that the decoder has them in.

    Args:
      config: the decoder's architecture.
      batch: the tokens at hand.
      policy: what computes attention and experts.
      index: [B, T] int32, place of each token among the keys: in its row, or in a key-value cache.
      num_keys: S.
      image_tokens: soft tokens that an image has at most; None is no limit.
    """
    sliding, causal = text_spans(config, batch.positions, index, batch.image_ids, image_tokens)
    positions = swap_halves(batch.positions)

    def layer_view(spans: Spans, head_dim: int, frequencies: np.ndarray) -> LayerView:
        shape = Shape(index.shape[1], num_keys, head_dim, spans.back, spans.ahead)
        exchange = exchange_for(spans)
        return LayerView(
            rotary_angles(positions, frequencies),
            rotary_angles(batch.positions, frequencies),
            spans if exchange is None else exchange.spans(spans),
            choose(policy, shape),
            exchange,
        )

    head_dim, global_head_dim = config.head_dim, config.global_head_dim
    global_frequencies = rotary_frequencies(global_head_dim, config.global_rope_theta, config.global_rope_fraction)
    return AttentionView(
        index,
        swap_halves(batch.segment_ids) > 0,
        layer_view(sliding, head_dim, rotary_frequencies(head_dim, config.rope_theta)),
        layer_view(causal, global_head_dim, global_frequencies),
        expert_parallel.choose(policy),
    )


class Attention(nnx.Module):
    """Attention of one decoder layer. Source: docs/gemma4.md section 2, "Attention".

    Args of the constructor:
      is_global: global rather than sliding.
      shares_kv: has no K and V of its own; uses those it is given.
    """

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, is_global: bool, shares_kv: bool, param_dtype: jnp.dtype):
        self.is_global = is_global
        self.shares_kv = shares_kv
        self.eps = config.norm_eps
        head_dim = config.global_head_dim if is_global else config.head_dim
        num_kv_heads = config.num_global_kv_heads if is_global else config.num_kv_heads
        embed = {"embed": config.embed_dim}
        queries = {"heads": config.num_heads, "head_dim": head_dim}
        keys = {"kv_heads": num_kv_heads, "head_dim": head_dim}
        self.q = Linear(rngs, embed, queries, param_dtype=param_dtype)
        # The scale of attention is 1; the usual head_dim**-0.5 is where this norm starts.
        self.q_norm = RMSNorm(
            {"head_dim": head_dim}, eps=config.norm_eps, param_dtype=param_dtype, initial_scale=head_dim**-0.5
        )
        if not shares_kv:
            self.k = Linear(rngs, embed, keys, param_dtype=param_dtype)
            self.k_norm = RMSNorm({"head_dim": head_dim}, eps=config.norm_eps, param_dtype=param_dtype)
            self.v = None if is_global and config.uses_k_eq_v else Linear(rngs, embed, keys, param_dtype=param_dtype)
        self.o = Linear(rngs, queries, embed, param_dtype=param_dtype)

    def __call__(
        self, x: jax.Array, view: AttentionView, shared: KeyValues | None, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        """Attends.

        Args:
          x: [B, T, D], normalised.
          view: of the tokens.
          shared: keys and values to use if this layer shares them, exchanged.
          cache: keys and values [B, S, K, H] of earlier calls, into which this call's are written at the queries'
            places (dropped where it is S or more); without it the keys are the tokens themselves.
        Returns:
          ([B, T, D], the layer's keys and values, those of a row or of the cache).
        """
        layer = view.global_layer if self.is_global else view.sliding_layer
        q = constrain(rotate(self.q_norm(self.q(x)), layer.angles), "batch", "length", "heads", None)
        if self.shares_kv:
            assert shared is not None
            kv = seen = shared
        else:
            raw_k = self.k(x)
            raw_v = raw_k if self.v is None else self.v(x)
            kv = self._finish(raw_k, raw_v, layer.angles)
            if cache is not None:
                rows = jnp.arange(x.shape[0])[:, None]
                kv = KeyValues(
                    *(old.at[rows, view.places].set(new, mode="drop") for old, new in zip(cache, kv, strict=True))
                )
            if layer.exchange is None or self.v is not None:
                seen = layer.exchanged(kv)
            else:  # what both are made of is exchanged once
                raw = layer.exchange(raw_k)
                copies = raw.shape[1] // layer.key_angles.shape[1]
                seen = self._finish(raw, raw, jnp.tile(layer.key_angles, (1, copies, 1)))
        out = attend(q, seen.k, seen.v, layer.spans, implementation=layer.implementation, exchange=layer.exchange)
        return self.o(out), kv

    def _finish(self, raw_k: jax.Array, raw_v: jax.Array, angles: jax.Array) -> KeyValues:
        """Keys normalised and rotated, values normalised."""
        return KeyValues(rotate(self.k_norm(raw_k), angles), rms_normalize(raw_v, self.eps).astype(raw_v.dtype))
