"""`KernelPolicy`: how a model computes what there is more than one way to compute."""

from typing import NamedTuple


class KernelPolicy(NamedTuple):
    """What computes attention and experts, and on what.

    Attributes:
      platform: of the devices that the model runs on, "cpu", "gpu" or "tpu": not always those of this machine.
      attention: a key of `ops.attention.IMPLEMENTATIONS`, or "auto".
      experts: a key of `ops.expert_parallel.IMPLEMENTATIONS`, or "auto".
      expert_exchange: a key of `ops.expert_exchange.EXCHANGES`, or "auto".
    """

    platform: str = "cpu"
    attention: str = "auto"
    experts: str = "auto"
    expert_exchange: str = "auto"
