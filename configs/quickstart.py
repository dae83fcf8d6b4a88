"""The whole in miniature: a Gemma 4 with every part switched on learns to read handwritten numbers, from scratch.

  make quickstart                     # or, from an installed package, in any folder:
  gemma4 train --config=quickstart

Data: images composed of real handwritten digits, one to six to an image, interleaved with questions and answers; and
Python source code as plain text. Both ship with the package.
Time: at most 5 minutes on 2 CPU cores after installation.
Result: at least 90% of held-out numbers read exactly; near chance when the images are blanked.
Writes: runs/quickstart with report.html, summary.json, metrics.jsonl, checkpoints, and an export for transformers.
"""

from ml_collections import ConfigDict

from gemma4_jax.configs import base


def get_config() -> ConfigDict:
    """The run behind `make quickstart`."""
    config = base.get_config("quickstart")
    config.name = "quickstart"
    config.run_dir = "runs/quickstart"
    return config
