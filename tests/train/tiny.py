"""A run config for tests: the tiny model, which has every part, and a few steps."""

from ml_collections import ConfigDict

from gemma4_jax.configs import base
from gemma4_jax.run_config import RunConfig

FREEZE_VISION = ({"pattern": r"(vision|image_projection)\..*", "learning_rate_scale": 0.0},)
"""optimizer.groups that leave the vision tower as it is."""


def get_config() -> ConfigDict:
    config = base.get_config("tiny")
    config.name = "tiny"
    config.data.seq_len, config.data.batch_size = 192, 8
    config.data.images_per_row, config.data.patches_per_row = 2, 560
    config.train.num_steps, config.train.loss_chunk = 20, 64
    config.optimizer.warmup_steps = 2
    config.checkpoint.every_steps, config.evaluators.eval.every_steps, config.log.every_steps = 7, 10, 1
    config.evaluators.eval.num_documents = 12
    config.log.tensorboard = False
    return config


def typed(config: ConfigDict) -> RunConfig:
    """What the command line makes of a config."""
    return RunConfig.from_dict(config.to_dict())
