"""One owner of a run directory: the process whose files they are."""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma4_jax.errors import InputError
from gemma4_jax.processes import agree

HEARTBEAT_SECONDS = 5.0
"""How often an owner touches its file."""

PATIENCE_SECONDS = 20.0
"""How long another machine watches the file before it takes the owner for dead."""


class RunLock:
    """Holds a run directory for this run, all of whose processes enter it; its first process owns it.

    RUN_DIR/lock names the owner. The kernel locks the file for as long as the owner lives, so that one that crashed
    holds nothing. Not every network disk tells other machines of that: there the file is watched for as long as a
    living owner could leave it untouched.

    Args:
      run_dir: absolute path; it is made if need be.
      say: prints a line.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run_dir, self._path, self._say = run_dir, run_dir / "lock", say
        self._file: int | None = None
        self._is_released = threading.Event()
        self._owner = {
            "host": platform.node(),
            "process": os.getpid(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": _machine(),
        }

    def __enter__(self) -> "RunLock":
        if refusal := agree(self._refusal_of_disk):
            raise InputError(refusal)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Makes sure, before something is overwritten, that no other machine took this process for dead.

        Raises:
          InputError: another run owns the directory now.
        """
        if self._file is not None and (owner := _read(self._path)) != self._owner:
            raise self._refusal(owner)

    def release(self) -> None:
        """Lets the directory go. A second time does nothing."""
        self._is_released.set()
        file, self._file = self._file, None
        if file is not None:
            if _read(self._path) == self._owner:
                self._path.unlink(missing_ok=True)
            os.close(file)

    def _refusal_of_disk(self) -> str:
        """Acquires the lock; if that is not possible, why, for every process to say."""
        try:
            self._acquire()
        except InputError as error:
            return str(error)
        return ""

    def _acquire(self) -> None:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            file, is_locked = self._open()
            try:
                self._wait_for_sign_of_life(is_locked)
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(self._owner).encode(), 0)
                os.fsync(file)
            except BaseException:
                os.close(file)
                raise
        except OSError as error:
            raise InputError(
                f"run_dir={str(self._run_dir)!r} cannot be written to ({error.strerror}): give a folder that takes "
                "new files."
            ) from error
        self._file = file
        threading.Thread(target=self._beat, args=(file,), daemon=True).start()

    def _open(self) -> tuple[int, bool]:
        """The open file, and whether its disk knows locks."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            is_locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise self._refusal(_read(self._path)) from None
            except OSError:
                is_locked = False
            # Between the opening and the locking its owner may have left, and removed it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), self._path.stat()):
                    return file, is_locked
            os.close(file)

    def _wait_for_sign_of_life(self, is_locked: bool) -> None:
        """Raises if the owner that the file names, whom its lock does not prove dead, is seen to live."""
        owner = _read(self._path)
        if not owner or (is_locked and owner.get("machine") == self._owner["machine"]):
            return
        self._say(f"{self._path} names {_name(owner)}: waiting {PATIENCE_SECONDS:.0f} s to see whether that still runs")
        touched, ends = _touched(self._path), time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < ends:
            time.sleep(min(1.0, PATIENCE_SECONDS / 10))
            if _touched(self._path) != touched:
                raise self._refusal(owner)

    def _beat(self, file: int) -> None:
        while not self._is_released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is away for a moment
                os.utime(file)

    def _refusal(self, owner: dict[str, Any]) -> InputError:
        return InputError(
            f"run_dir={str(self._run_dir)!r} is in use by {_name(owner)}: wait for its end or stop it, or give another "
            "run_dir."
        )


def _read(path: Path) -> dict[str, Any]:
    """What a lock says of its owner; nothing if it cannot be read, as between being made and being written."""
    try:
        owner = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _touched(path: Path) -> int:
    # Opened, because a network disk answers for a file that is not from memory that may be a minute old.
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process, which has only begun"
    return f"process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}"


def _machine() -> str:
    """What kernel this is: two containers of a machine share its locks, and two machines may share a name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return platform.node()
