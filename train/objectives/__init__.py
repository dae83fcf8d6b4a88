"""What a run minimises: one function each, from a model and a batch to means."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from gemma4_jax.batch import Batch
from gemma4_jax.model import Gemma4


class Mean(NamedTuple):
    """A mean that is taken once, over all microbatches and devices: the sum of totals over the sum of weights.

    Attributes:
      total: scalar or array.
      weight: of the rows of the batch, a sum over them that no parameter changes, at least 0; or a float, where every
        microbatch counts the same. A mean of no weight is 0.
      coefficient: how often the mean counts in what is minimised; 0 only measures.
    """

    total: jax.Array
    weight: jax.Array | float
    coefficient: float = 0.0


Objective = Callable[[Gemma4, Batch], dict[str, Mean]]
"""(model, one microbatch) -> means by name, among them "loss". Their names are those of the metrics."""
