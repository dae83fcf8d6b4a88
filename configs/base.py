"""The defaults of a run. Other configs start from `get_config` and change what they need.

  gemma4 train --config=base:SIZE     # the defaults, with another architecture

Every field, with its meaning and its rule, is in gemma4_jax/run_config.py, and `gemma4 fields` tells them.
"""

from ml_collections import ConfigDict

from gemma4_jax import sizes
from gemma4_jax.errors import InputError
from gemma4_jax.fields import to_dict
from gemma4_jax.run_config import DataConfig, EvaluatorConfig, RunConfig, SourceConfig


def get_config(size: str = "quickstart") -> ConfigDict:
    """The defaults of a run: the bundled data, and an evaluation of its held-out documents.

    Args:
      size: name of the architecture that `model` starts from, a key of `gemma4_jax.sizes.SIZES`.
    Returns:
      A locked ConfigDict: a field that is not here cannot be added by mistake.
    Raises:
      InputError: there is no such size.
    """
    if size not in sizes.SIZES:
        raise InputError(f"{size!r} is not a size of the model: there are {', '.join(sizes.SIZES)}.")
    sources = {
        "digits": SourceConfig("digits", kind="digits", weight=0.9),
        "python": SourceConfig("python", kind="python", weight=0.1),
    }
    run = RunConfig(sizes.SIZES[size](), DataConfig(sources), evaluators={"eval": EvaluatorConfig("eval")})
    return ConfigDict(to_dict(run)).lock()
