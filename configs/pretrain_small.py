"""Pre-train the small Gemma 4, 446 million parameters, from scratch on one accelerator of 24 GB or more.

  gemma4 train --config=pretrain_small --config.run_dir=runs/small --config.tokenizer=tokenizer.json

A starting point that has not been trained to its end: the bundled sources only show the shape of `data.sources`. The
tokenizer must be one of the released models' vocabulary. Parameters, their gradients and both moments take 16 bytes
each in float32, 7.1 GB. On more devices the mesh spreads the batch: --config.data.batch_size grows with them.
"""

from ml_collections import ConfigDict

from gemma4_jax.configs import base


def get_config() -> ConfigDict:
    """One device, or copies of the model on each of several."""
    config = base.get_config("small")
    config.name = "pretrain_small"
    config.run_dir = "runs/pretrain_small"

    config.data.seq_len = 2048
    config.data.images_per_row = 4
    config.data.soft_tokens_per_image = 280
    config.data.batch_size = 32  # 65,536 tokens
    config.data.num_workers = 4

    config.train.num_steps = 50_000
    config.train.grad_accum_steps = 8
    config.train.remat = "full"
    config.train.loss_chunk = 256

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 1000

    config.checkpoint.every_steps = 1000
    config.evaluators.eval.every_steps = 1000
    return config
