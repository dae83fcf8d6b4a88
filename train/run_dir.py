"""The folder of a run: is it ours, may we write there, and what made it.

A run directory holds config.json (the resolved config), versions.json (what the latest start ran on), metrics.jsonl,
checkpoints/, tensorboard/, report.html and summary.json.
"""

import json
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from gemma4_jax.errors import InputError
from gemma4_jax.files import write_atomically

MAY_CHANGE = ("run_dir", "name", "mesh", "train.num_steps", "train.remat", "checkpoint", "eval", "log", "export")
"""Fields, and sections, that may differ from one start of a run to the next.

They do not change what a step computes, but for train.num_steps: a run made longer follows the longer schedule from
where it stands.
"""

PACKAGES = ("gemma4-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
"""Packages whose versions are kept with a run."""


def open_run_dir(config: Any) -> Path:
    """Makes the run directory if need be, and writes config.json and versions.json into it.

    Args:
      config: the resolved run config.
    Returns:
      Its absolute path.
    Raises:
      InputError: it cannot be written to, or holds a run of a different config.
    """
    run_dir = Path(config.run_dir).absolute()
    resolved = json.loads(json.dumps(config.to_dict()))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
        saved = run_dir / "config.json"
        if saved.exists():
            _check_same_run(run_dir, json.loads(saved.read_text("utf-8")), resolved)
        if jax.process_index() == 0:
            write_atomically(saved, json.dumps(resolved, indent=2) + "\n")
            write_atomically(run_dir / "versions.json", json.dumps(versions(), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"run_dir={config.run_dir!r} cannot be written to ({error.strerror}): give a folder that takes new files."
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"run_dir={config.run_dir!r} holds a config.json that is not JSON ({error}): give another run_dir."
        ) from error
    return run_dir


def _check_same_run(run_dir: Path, saved: Any, given: Mapping[str, Any]) -> None:
    old, new = _flatten(saved), _flatten(given)
    absent = object()
    differing = [
        f"{field} was {old.get(field)!r} and is now {new.get(field)!r}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field, absent) != new.get(field, absent)
        and not any(field == allowed or field.startswith(f"{allowed}.") for allowed in MAY_CHANGE)
    ]
    if differing:
        raise InputError(
            f"run_dir={str(run_dir)!r} holds a run of a different config ({'; '.join(differing)}): "
            "give another run_dir, or the same config to go on with that run."
        )


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dictionaries to {dotted path: value}; an empty dictionary is a value."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flatten(inner, f"{path}.{name}" if path else str(name))
    return flat


def versions() -> dict[str, Any]:
    """What this process runs: interpreter, packages, devices, git revision of the source, command line."""
    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed.get(name) for name in PACKAGES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "git_revision": _git_revision(),
        "command": shlex.join([sys.executable, *sys.argv]),
    }


def _git_revision() -> str | None:
    """The commit of the source tree that this file belongs to, "+" where it has changes; None outside of git."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return run.stdout.strip()

    try:
        # A package installed inside some other repository is not of that repository.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
