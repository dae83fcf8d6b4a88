"""Pre-train a Gemma 4 31B from scratch on a TPU v5p slice of 4x8x8: 256 chips of 95 GB.

  gemma4 train --config=pretrain_31b --distributed --config.run_dir=/shared/31b --config.tokenizer=tokenizer.json

A starting point that has not been trained to its end: the architecture is the released one, the compiler has given
every buffer of the step its place on the slice (docs/compiled.md: what it takes of a chip), and the bundled sources
only show the shape of `data.sources`. The tokenizer must be one of the model's vocabulary. There are 31.3 billion
parameters; they, their gradients and both moments take 16 bytes each in float32, 500 GB, of which each of the 32
devices that share a copy holds 15.6 GB.
"""

from ml_collections import ConfigDict

from gemma4_jax.configs import base


def get_config() -> ConfigDict:
    """256 devices: 8 copies of parameters, each spread over a plane of 32 devices.

    To spread heads and widths as well (mesh.tensor = 4) saves little memory and sends almost four times the bytes.
    """
    config = base.get_config("31b")
    config.name = "pretrain_31b"
    config.run_dir = "runs/pretrain_31b"

    config.mesh.data = -1
    config.mesh.fsdp = 32

    config.data.seq_len = 8192
    config.data.images_per_row = 16
    config.data.soft_tokens_per_image = 280
    config.data.batch_size = 512  # 4.2 million tokens
    config.data.num_workers = 8

    config.train.num_steps = 200_000
    config.train.remat = "full"
    config.train.loss_chunk = 512

    config.optimizer.learning_rate = 1.5e-4
    config.optimizer.warmup_steps = 2000

    config.checkpoint.every_steps = 500
    config.evaluators.eval.every_steps = 1000
    return config
