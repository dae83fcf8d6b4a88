"""What is measured now and then beside the training loss: KIND -> how it is made, one file each."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from gemma4_jax.fields import find
from gemma4_jax.run_config import EvaluatorConfig
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.program import Program
from gemma4_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an evaluator works with.

    Attributes:
      program: of the run.
      tokenizer: of the run.
      pause: to be called between batches: the run may save and leave there.
    """

    program: Program
    tokenizer: Tokenizer
    pause: Callable[[], None]


class Evaluator(abc.ABC):
    """Measures a model. Every process makes it, and calls it at the same steps."""

    def compile(self, state: TrainState) -> None:  # noqa: B027, which need not do anything
        """Compiles what `measure` will need, so that it cannot fail for want of it later."""

    @abc.abstractmethod
    def measure(self, state: TrainState) -> dict[str, float]:
        """Name -> figure; the run's metrics call it EVALUATOR_NAME."""

    def finish(self, state: TrainState) -> tuple[dict[str, float], list[Any]]:
        """At the end of the run: more figures for its summary, and `answers.Reading`s for its report."""
        return {}, []


Make = Callable[[EvaluatorConfig, Setting], Evaluator | None]
"""(its config, what it works with) -> the evaluator; None where the run has nothing that it could read."""


def _answers(config: EvaluatorConfig, setting: Setting) -> Evaluator | None:
    from gemma4_jax.train.evaluators.answers import make_answers

    return make_answers(config, setting)


EVALUATORS: dict[str, Make] = {"answers": _answers}
"""Kind -> how an evaluator of it is made."""


def make_evaluator(config: EvaluatorConfig, setting: Setting) -> Evaluator | None:
    """The evaluator that a config describes.

    Raises:
      InputError: there is no such kind, or its data or options are not acceptable.
    """
    return find(EVALUATORS, f"{config.section}.kind", config.kind)(config, setting)
