"""Gemma 4 in JAX and Flax NNX: the model, its data, its training, its export.

Importing the package is cheap: what needs jax is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gemma4_jax.config import Gemma4Config
from gemma4_jax.errors import InputError
from gemma4_jax.sizes import SIZES

if TYPE_CHECKING:
    from gemma4_jax.batch import Batch
    from gemma4_jax.data.processor import Processor
    from gemma4_jax.generation import generate
    from gemma4_jax.hf.pretrained import load_hf, save_hf
    from gemma4_jax.model import Gemma4

__all__ = [
    "SIZES", "Batch", "Gemma4", "Gemma4Config", "InputError", "Processor", "generate", "load_hf", "save_hf",
]  # fmt: skip

_NEEDS_JAX = {
    "Batch": "gemma4_jax.batch",
    "Gemma4": "gemma4_jax.model",
    "Processor": "gemma4_jax.data.processor",
    "generate": "gemma4_jax.generation",
    "load_hf": "gemma4_jax.hf.pretrained",
    "save_hf": "gemma4_jax.hf.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NEEDS_JAX[name]), name)
