"""Train a Gemma 4 26B-A4B, 8 of 128 experts for each token, on a TPU v5p slice of 4x4x4, the vision tower frozen.

  gemma4 train --config=finetune_26b_a4b --distributed --config.init.from_hf=CHECKPOINT --config.tokenizer=CHECKPOINT

A starting point that has not been trained to its end: the architecture is the released one, and the compiler has given
every buffer of the step its place on the slice (docs/compiled.md: what it takes of a chip). Without init.from_hf it
begins from random parameters. Of 25.8 billion parameters the experts are 22.8 billion; they, their gradients and both
moments take 16 bytes each in float32, 365 GB, spread over all 64 devices. The rest of the decoder is spread over fsdp
only.
"""

from ml_collections import ConfigDict

from gemma4_jax.configs import base


def get_config() -> ConfigDict:
    """64 devices: every copy of parameters spread over 8 x 8, 16 experts to a device of the expert axis."""
    config = base.get_config("26b_a4b")
    config.name = "finetune_26b_a4b"
    config.run_dir = "runs/finetune_26b_a4b"

    config.mesh.data = -1
    config.mesh.fsdp = 8
    config.mesh.expert = 8

    config.data.seq_len = 4096
    config.data.images_per_row = 8
    config.data.soft_tokens_per_image = 280
    config.data.batch_size = 64
    config.data.num_workers = 8

    config.train.num_steps = 2000
    config.train.remat = "full"
    config.train.loss_chunk = 512

    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0
    config.optimizer.groups = ({"pattern": r"(vision|image_projection)\..*", "learning_rate_scale": 0.0},)

    config.checkpoint.every_steps = 500
    config.evaluators.eval.every_steps = 500
    return config
