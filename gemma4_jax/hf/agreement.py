"""What the first process does for all: the others learn if it fails, so that none waits for it for ever."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma4_jax.errors import InputError


@contextlib.contextmanager
def led_by_first_process() -> Iterator[None]:
    """Around what the first process does, and what the others do with it; all leave it together.

    Raises:
      InputError: in the other processes, if the first one fails.
    """
    try:
        yield
    except BaseException:
        if jax.process_index() == 0:
            go_on(is_well=False)
        raise
    go_on()


def go_on(*, is_well: bool = True) -> None:
    """A point at which every process waits for the first one, before they do something together.

    Args:
      is_well: of the first process; what others give is not read.
    Raises:
      InputError: in the other processes, if the first one is not well.
    """
    if jax.process_count() == 1:
        return
    first_is_well = multihost_utils.broadcast_one_to_all(np.int32(is_well))
    if jax.process_index() != 0 and not first_is_well:
        raise InputError("the first process failed: its message says why.")
