"""How large a Gemma 4 is: parameters by part, those that work on one token, and the arithmetic of one token.

The model is built abstractly: no array is allocated.
"""

import math
from collections import Counter

from flax import nnx

from gemma4_jax.config import Gemma4Config, TextConfig
from gemma4_jax.model import Gemma4

PARTS = (
    "decoder",
    "experts",
    "token embedding",
    "per-layer table",
    "vision",
    "image projection",
    "audio",
    "audio projection",
)
"""Parts of a model, of which all but the last four work on text."""


def count_parameters(config: Gemma4Config) -> dict[str, int]:
    """Parameters of each of PARTS; buffers (layer scalars, clip bounds, statistics) are not counted."""
    params = nnx.state(nnx.eval_shape(lambda: Gemma4(config, nnx.Rngs(0))), nnx.Param)
    counts = Counter(dict.fromkeys(PARTS, 0))
    for path, param in nnx.to_flat_state(params):
        counts[_part_of(path)] += math.prod(param.get_value().shape)
    return dict(counts)


def count_active_parameters(config: Gemma4Config) -> int:
    """Parameters that work on one token of text: of the experts only those chosen, and no tower."""
    counts, text = count_parameters(config), config.text
    chosen = counts["experts"] * text.num_experts_per_token // text.num_experts if text.num_experts else 0
    return counts["decoder"] + counts["token embedding"] + counts["per-layer table"] + chosen


def flops_per_token(config: Gemma4Config, length: int) -> float:
    """Floating-point operations of a forward pass over text, for each token, a multiply-add counted as two.

    Each active parameter is used once, except those of the per-layer table, of which one row is looked up, and norms,
    which are counted as if they were matrices (less than 0.01%). The token embedding counts as the head.

    Args:
      config: the architecture.
      length: tokens of a document, over whose queries attention is averaged; 0 leaves attention's products out.
    """
    weights = count_active_parameters(config) - count_parameters(config)["per-layer table"]
    attention = sum(_attention_flops(config.text, layer, length) for layer in range(config.text.num_layers))
    return 2 * weights + attention


def _attention_flops(text: TextConfig, layer: int, length: int) -> float:
    """Of the two products with keys and values, for the mean query of a document."""
    is_global = text.is_global(layer)
    window = length if is_global else min(length, text.sliding_window)
    # The first `window` queries see 1, 2, ... keys, and the others `window`.
    keys = window - window * (window - 1) / (2 * length) if length else 0
    return 4 * text.num_heads * (text.global_head_dim if is_global else text.head_dim) * keys


def _part_of(path: tuple) -> str:
    match path:
        case ("embedder", "table"):
            return "token embedding"
        case ("per_layer_embedder", "table"):
            return "per-layer table"
        case ("vision" | "audio" as tower, *_):
            return tower
        case ("image_projection" | "audio_projection" as projection, *_):
            return projection.replace("_", " ")
        case _:
            return "experts" if "experts" in path else "decoder"
