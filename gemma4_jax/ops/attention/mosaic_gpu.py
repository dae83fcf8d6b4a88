"""Attention on Hopper GPUs: tokamax's kernels, which read the interval of keys of every query.

They skip the blocks of keys that no query of a block sees, forward and backward, and make no [T, S] array. Their masks
are not in tokamax's public interface: hence the one version of it in setup.cfg. No GPU has run this, so "auto" does not
take it. What has been seen, without one: that forward and backward lower for Hopper (the backward pass of Blackwell
does not), and that these masks mean what spans do (tests/ops/test_mosaic_gpu.py).
"""

from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax.ops import hopper
from gemma4_jax.ops.attention.spans import Spans

HEAD_DIM = 256
"""Of sliding layers. Those of global layers do not fit the shared memory of a multiprocessor."""

BLOCK = 128
"""Of whose multiples of queries and of keys the kernels compute."""


def mosaic_gpu_attention(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
    """As `reference_attention`, in bfloat16.

    Raises:
      NotImplementedError: the GPU is of another generation, or q, k and v are not in bfloat16.
    """
    # It is an extra, and takes seconds to import.
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    hopper.keep_flags()
    num_queries = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0))) for x in (q, k, v))
    fill = (0, 0), (0, -num_queries % BLOCK)
    # Queries that fill the last block see the first key: a softmax over nothing is no number.
    spans = Spans(jnp.pad(spans.start, fill), jnp.pad(spans.stop, fill, constant_values=1))
    out = PallasMosaicGpuFlashAttention()(q, k, v, mask=mask_of(spans), logits_scale=1.0)
    return out[:, :num_queries]


def mask_of(spans: Spans) -> Any:
    """tokamax's mask of spans, the same for all heads."""
    from tokamax._src.ops.attention.base import Mask

    return Mask(k_start=spans.start[:, None], k_end=spans.stop[:, None])


def reason_against(shape: Any, platform: str) -> str | None:
    """Why it should not compute attention of a shape, or None."""
    if (reason := hopper.reason_against(platform)) is not None:
        return reason
    if shape.head_dim != HEAD_DIM:
        return f"its heads are {HEAD_DIM} wide"
    if shape.num_queries < BLOCK:
        return f"it has fewer queries than a block, which is {BLOCK}"
    return None
