"""What tokamax's kernels for Hopper GPUs ask for, attention's and the experts'."""

import importlib.util

from absl import flags


def reason_against(platform: str) -> str | None:
    """Why they cannot run on a platform, or None."""
    if platform != "gpu":
        return "it is written for Hopper GPUs"
    if importlib.util.find_spec("tokamax") is None:
        return 'tokamax is not installed: pip install "gemma4-jax[mosaic_gpu]"'
    return None


def keep_flags() -> None:
    """Before the first kernel, or tokamax takes the arguments of whatever command this is for its own."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
