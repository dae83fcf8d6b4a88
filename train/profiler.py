"""A trace of what the devices do in one step, for TensorBoard's profiler or Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Takes steps, one of them with a trace.

    Args:
      folder: where the trace goes.
      traced: number of the step; 0 traces none. The first step of a start is not like the others.
    """

    def __init__(self, folder: Path, traced: int) -> None:
        self._folder, self._traced = folder, traced

    def take(self, number: int, step: Callable[..., Any], *inputs: Any) -> Any:
        """What `step` gives, which any trace calls the step of this number; the one that is traced is waited for."""
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            if number != self._traced:
                return step(*inputs)
            with jax.profiler.trace(str(self._folder)):
                return jax.block_until_ready(step(*inputs))
