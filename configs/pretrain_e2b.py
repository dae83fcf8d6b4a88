"""Pre-train a Gemma 4 E2B from scratch on a TPU v5p slice of 4x4x4: 64 chips of 95 GB.

  gemma4 train --config=pretrain_e2b --distributed --config.run_dir=/shared/e2b --config.tokenizer=tokenizer.json

A starting point that has not been trained to its end: the architecture is the released one, the compiler has given
every buffer of the step its place on the slice (docs/compiled.md: what it takes of a chip), and the bundled sources
only show the shape of `data.sources`. The tokenizer must be one of the model's vocabulary. Without the audio tower
there are 4.8 billion parameters; they, their gradients and both moments take 16 bytes each in float32, 77 GB, of which
each of the 16 devices that share a copy holds 4.8 GB.
"""

from ml_collections import ConfigDict

from gemma4_jax.configs import base


def get_config() -> ConfigDict:
    """64 devices: 4 copies of parameters, each spread over a plane of 16 devices."""
    config = base.get_config("e2b")
    config.name = "pretrain_e2b"
    config.run_dir = "runs/pretrain_e2b"
    config.model.audio = None  # text and images only

    config.mesh.data = -1
    config.mesh.fsdp = 16

    config.data.seq_len = 8192
    config.data.images_per_row = 16
    config.data.soft_tokens_per_image = 280
    config.data.batch_size = 256  # 2.1 million tokens
    config.data.num_workers = 8

    config.train.num_steps = 100_000
    config.train.remat = "full"
    config.train.loss_chunk = 512

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2000

    config.checkpoint.every_steps = 1000
    config.evaluators.eval.every_steps = 1000
    return config
