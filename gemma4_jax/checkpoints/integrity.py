"""Is a checkpoint what was written? Checksums of its files, and the newest checkpoint of a run that is intact.

RUN_DIR/checkpoints/STEP/checksums.json has the size and the CRC-32 of every file of the items beside it. It is written
before the folder gets its name, so a whole checkpoint is never without it, unless it is older than these checksums.
RUN_DIR/frozen, what all checkpoints of a run share, has one too.
"""

import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from gemma4_jax.errors import InputError
from gemma4_jax.files import checksum, write_atomically

CHECKSUMS = "checksums.json"
"""The file in the folder of a checkpoint with sizes and checksums of the others."""

FROZEN = "frozen"
"""The folder in a run directory with what all its checkpoints share."""

_NUM_THREADS = 4
_MAX_LIST_BYTES = 1 << 28


class Verdict(NamedTuple):
    """What is known of a checkpoint.

    Attributes:
      damage: the first thing that is wrong with it, as a clause about a file; None if nothing is.
      by: what was compared: "checksums", "sizes" or, for a checkpoint older than its checksums, "".
      num_files: that were compared.
      num_bytes: in these files.
    """

    damage: str | None
    by: str = ""
    num_files: int = 0
    num_bytes: int = 0


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of all checkpoints in a run directory, in order, intact or not."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def write_checksums(folder: Path, *, sizes_only: bool = False) -> None:
    """Writes checksums.json into the folder of a checkpoint to which nothing is added any more.

    Args:
      folder: of the checkpoint, not yet in its place.
      sizes_only: leave out the checksums, for which every file is read.
    Raises:
      OSError: a file cannot be read, or this one cannot be written.
    """
    sizes = _sizes(folder)
    sums = dict.fromkeys(sizes) if sizes_only else _checksums(folder, sizes)
    files = {name: {"bytes": size, "crc32": sums[name]} for name, size in sorted(sizes.items())}
    write_atomically(folder / CHECKSUMS, json.dumps({"files": files}, indent=1) + "\n")


def verify(folder: Path) -> Verdict:
    """Compares the files of a checkpoint with its checksums.

    Args:
      folder: RUN_DIR/checkpoints/STEP.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return Verdict(None if (folder / "model").is_dir() else "model is missing")
    try:
        written = _read_list(path)
        sizes = _sizes(folder)
    except (OSError, ValueError, RecursionError) as error:
        return Verdict(f"{path.name} cannot be read ({_reason(error)})")
    for name, (size, _) in written.items():
        if name not in sizes:
            return Verdict(f"{name} is missing")
        if sizes[name] != size:
            return Verdict(f"{name} has {sizes[name]:,} bytes of {size:,}")
    wanted = {name: crc for name, (_, crc) in written.items() if crc is not None}
    try:
        found = _checksums(folder, wanted)
    except OSError as error:
        return Verdict(f"{error.filename or 'a file'} cannot be read ({_reason(error)})")
    changed = [name for name in wanted if found[name] != wanted[name]]
    damage = f"the bytes of {changed[0]} are not those that were written" if changed else None
    by = "checksums" if wanted else "sizes"
    return Verdict(damage, by, len(written), sum(size for size, _ in written.values()))


def newest_intact(run_dir: Path) -> int:
    """Step of the newest intact checkpoint of a run; newer ones that are damaged are named in a warning.

    Args:
      run_dir: of the run.
    Raises:
      InputError: there is none.
    """
    damaged: list[str] = []
    if (run_dir / FROZEN).exists() and (damage := verify(run_dir / FROZEN).damage) is not None:
        raise InputError(
            f"{run_dir / FROZEN}, a part of every checkpoint of this run, is damaged: {damage}; restore its files, or "
            "give another run."
        )
    for step in reversed(checkpoint_steps(run_dir)):
        folder = run_dir / "checkpoints" / str(step)
        verdict = verify(folder)
        if verdict.damage is not None:
            damaged.append(f"checkpoint {folder} is damaged: {verdict.damage}")
            continue
        for sentence in damaged:
            warnings.warn(f"{sentence}; the checkpoint of step {step} is taken.", stacklevel=2)
        if not verdict.by:
            warnings.warn(f"checkpoint {folder} has no checksums: nothing tells whether it is intact.", stacklevel=2)
        return step
    if damaged:
        raise InputError(
            f"{run_dir} holds no intact checkpoint ({'; '.join(damaged)}): restore these files, or give another run."
        )
    raise InputError(f"{run_dir} holds no checkpoint: train it first.")


def _read_list(path: Path) -> dict[str, tuple[int, int | None]]:
    """File -> (size, checksum), from a file that nobody vouches for; ValueError where it is not of this form."""
    if path.stat().st_size > _MAX_LIST_BYTES:
        raise ValueError("it is too large")
    content: Any = json.loads(path.read_bytes())
    try:
        (files,) = content.values()
        entries = {name: (entry["bytes"], entry["crc32"]) for name, entry in files.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("it is not a list of checksums") from error
    for size, crc in entries.values():
        if type(size) is not int or not (crc is None or type(crc) is int):
            raise ValueError("it is not a list of checksums")
    return entries


def _sizes(folder: Path) -> dict[str, int]:
    """Every file of the items -> its size. What lies beside the items is Orbax's own, and holds nothing of the run."""
    files = [path for path in folder.glob("*/**/*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _checksums(folder: Path, names: Any) -> dict[str, int]:
    """File -> its CRC-32; zlib lets go of the interpreter, so threads share the work and training goes on."""
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: checksum(folder / name), names), strict=True))


def _reason(error: Exception) -> str:
    return (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)).lower()
