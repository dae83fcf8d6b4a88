"""The one place that knows there may be several processes: what the first decides, all of them follow.

Each process sees a file system of its own, and a slow one shows files late: so nothing that all must do alike is read
from it by each.
"""

import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma4_jax.errors import InputError

T = TypeVar("T")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables that say which process this is. JAX reads the first by itself, and not the other two."""


def initialize(timeout: float = 300.0) -> None:
    """Joins this process to the others of its run; before any device is used.

    The three environment variables decide if all are set. Otherwise the cluster that JAX finds says what is not: a TPU
    slice by its metadata, SLURM, Open MPI, Kubernetes.

    Args:
      timeout: seconds within which all of them must have come.
    Raises:
      InputError: a variable is not possible, there is no cluster, or not all came in time.
    """
    address = os.environ.get(ADDRESS)
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise InputError(f"{ADDRESS}={address!r} is not possible: give HOST:PORT of the first process.")
    count, index = _number(COUNT, 1), _number(INDEX, 0)
    if count is not None and index is not None and index >= count:
        raise InputError(f"{INDEX}={index} is not possible: with {COUNT}={count} it is one of 0 to {count - 1}.")
    if address is not None and index == 0:
        _check_port(address)
    is_explicit = None not in (address, count, index)
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                address,
                count,
                index,
                cluster_detection_method="deactivate" if is_explicit else None,
                initialization_timeout=int(timeout) + 60,
            )
        except Exception as error:
            failures.append(error)

    # JAX ends the process with a stack trace when its own timeout is over, and does not hear Ctrl-C until then. So a
    # thread waits for the others, and this one for the thread.
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        where = f" at {ADDRESS}={address}" if address else ""
        raise InputError(
            f"not all processes of the run have met the first one{where} within {timeout:.0f} s: start the same "
            "command on every host, and see that its address and port can be reached from all."
        )
    if not failures:
        return
    reason = " ".join(str(failures[0]).split()).rstrip(".")
    if isinstance(failures[0], ValueError) and not is_explicit:
        raise InputError(
            f"there is no cluster here that says what the processes of the run are ({reason}): set "
            f"{ADDRESS}=HOST:PORT, {COUNT} and {INDEX}, or leave out --distributed on one machine."
        ) from failures[0]
    raise InputError(f"the processes of the run cannot be joined: {reason}.") from failures[0]


def _check_port(address: str) -> None:
    """Refuses a port on which this host listens already, for which jaxlib may crash."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"{ADDRESS}={address!r} is not possible: no process can listen at that port of this host ({error}): give a "
            "free one."
        ) from error


def _number(name: str, least: int) -> int | None:
    value = os.environ.get(name)
    if value is not None and not (value.isdecimal() and int(value) >= least):
        raise InputError(f"{name}={value!r} is not possible: give a whole number, at least {least}.")
    return None if value is None else int(value)


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
