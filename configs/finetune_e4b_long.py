"""Train a Gemma 4 E4B on rows of 131,072 tokens, as long as it is meant for, on a TPU v5p slice of 4x4x4.

  gemma4 train --config=finetune_e4b_long --distributed --config.init.from_hf=CHECKPOINT --config.tokenizer=CHECKPOINT

A starting point that has not been trained to its end: the architecture is the released one, and the compiler has given
every buffer of the step its place on the slice (docs/compiled.md: what it takes of a chip). Without init.from_hf it
begins from random parameters. A row is spread over 8 chips, 16,384 positions each: sliding layers exchange the width of
their window with the chips beside them, global layers gather keys and values. No row has room for sounds, so the audio
tower is frozen.
"""

from ml_collections import ConfigDict

from gemma4_jax.configs import base


def get_config() -> ConfigDict:
    """64 devices: parameters and rows spread over 8, the positions of a row over 8."""
    config = base.get_config("e4b")
    config.name = "finetune_e4b_long"
    config.run_dir = "runs/finetune_e4b_long"

    config.mesh.data = -1
    config.mesh.fsdp = 8
    config.mesh.context = 8

    config.data.seq_len = 131072
    config.data.images_per_row = 32
    config.data.soft_tokens_per_image = 280
    config.data.batch_size = 8  # 1 million tokens
    config.data.num_workers = 8

    config.train.num_steps = 1000
    config.train.remat = "full"
    config.train.loss_chunk = 8192  # 1,024 positions on each chip
    config.train.frozen_dtype = "bfloat16"

    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0
    config.optimizer.groups = ({"pattern": r"(vision|image_projection)\..*", "learning_rate_scale": 0.0},)

    config.checkpoint.every_steps = 200
    config.evaluators.eval.every_steps = 200
    return config
