"""The whole in miniature: a Gemma 4 with every part switched on learns to read handwritten numbers, from scratch.

  make quickstart                     # or, from an installed package, in any folder:
  gemma4 train --config=quickstart

Data: sheets of many aspect ratios with numbers of one to six real handwritten digits, interleaved with questions and
answers; and Python source code as plain text. Both ship with the package.
Time: about 4 minutes on 2 CPU cores after installation; benchmarks/quickstart.py prints the figures.
Result: about 94% of 1,024 held-out numbers read exactly, and none with the images blanked.
Writes: runs/quickstart with report.html, summary.json, metrics.jsonl, checkpoints, and an export for transformers.
"""

from ml_collections import ConfigDict

from gemma4_jax.configs import base


def get_config() -> ConfigDict:
    """The run behind `make quickstart`."""
    config = base.get_config("quickstart")
    config.name = "quickstart"
    config.run_dir = "runs/quickstart"

    # One layer of the tower learns as much from an image as two, in less time.
    config.model.vision.num_layers = 1
    # Sliding layers see the end of an image from the answer to it, where the number is.
    config.model.text.sliding_window = 16

    # A row holds the longest document: four images of 56 soft tokens and what is asked about them. A step reads about
    # thirty-five images.
    config.data.sources.digits.weight, config.data.sources.python.weight = 0.98, 0.02
    config.data.seq_len = 280
    config.data.images_per_row = 5
    config.data.patches_per_row = 896
    config.data.batch_size = 8

    config.train.num_steps = 600
    config.train.loss_chunk = 512
    config.optimizer.learning_rate = 8e-3
    config.optimizer.final_learning_rate_fraction = 0.03
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.01

    config.checkpoint.every_steps = 300
    config.evaluators.eval.every_steps = 300
    config.evaluators.eval.num_documents = 1024
    return config
