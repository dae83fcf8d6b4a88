"""A run config for tests: every part of the model on, as small as it goes, and a few steps."""

from ml_collections import ConfigDict

from gemma4_jax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config("quickstart")
    config.name = "tiny"
    text, vision = config.model.text, config.model.vision
    text.embed_dim, text.mlp_dim, text.expert_dim = 32, 32, 16
    text.head_dim, text.global_head_dim, text.per_layer_embed_dim = 8, 16, 8
    vision.embed_dim, vision.mlp_dim, vision.num_layers, vision.head_dim, vision.num_positions = 32, 32, 1, 16, 140

    config.data.seq_len, config.data.batch_size = 192, 8
    config.data.images_per_row, config.data.patches_per_row = 2, 560
    config.train.num_steps, config.train.loss_chunk = 20, 64
    config.optimizer.warmup_steps = 2
    config.checkpoint.every_steps, config.eval.every_steps, config.log.every_steps = 7, 10, 1
    config.eval.num_documents = 12
    config.log.tensorboard = False
    return config
