"""The one place that knows there may be several processes: what the first decides, all of them follow.

Each process sees a file system of its own, and a slow one shows files late: so nothing that all must do alike is read
from it by each.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma4_jax.errors import InputError

T = TypeVar("T")


def is_first() -> bool:
    """Whether this is the process that writes and decides."""
    return jax.process_index() == 0


def agree(decide: Callable[[], T]) -> T:
    """What the first process decides, in every process.

    Args:
      decide: called in the first process alone; gives what JSON can hold.
    Raises:
      InputError: in the other processes, if `decide` raises in the first.
    """
    decision: Any = None
    with led_by_first():
        if is_first():
            decision = decide()
    if jax.process_count() == 1:
        return decision
    content = np.frombuffer(json.dumps(decision).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = content if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def gather(value: T) -> list[T]:
    """What every process gives, in their order, in every process.

    Args:
      value: what JSON can hold.
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content))))
    padded = np.pad(content, (0, sizes.max() - len(content)))
    contents = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(contents, sizes, strict=True)]


@contextlib.contextmanager
def led_by_first() -> Iterator[None]:
    """Around what the first process does, and what the others do with it; all leave it together.

    Raises:
      InputError: in the other processes, if the first one fails.
    """
    try:
        yield
    except BaseException:
        if is_first():
            wait_for_first(is_well=False)
        raise
    wait_for_first()


def wait_for_first(*, is_well: bool = True) -> None:
    """A barrier: every process waits for the first one, before they do something together.

    Args:
      is_well: of the first process; what others give is not read.
    Raises:
      InputError: in the other processes, if the first one is not well.
    """
    if jax.process_count() == 1:
        return
    first_is_well = multihost_utils.broadcast_one_to_all(np.int32(is_well))
    if not is_first() and not first_is_well:
        raise InputError("the first process failed: its message says why.")
