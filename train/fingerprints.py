"""What the data of a run is known by, kept in RUN_DIR/data.json from its start and compared when it goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma4_jax.errors import InputError
from gemma4_jax.files import write_atomically
from gemma4_jax.processes import agree

Fingerprints = Mapping[str, Mapping[str, Any]]
"""Source -> its `fingerprint()`."""


def check_data(run_dir: Path, fingerprints: Fingerprints, *, is_resumed: bool, allow_changes: bool) -> list[str]:
    """Compares the data with what the run began with, and writes down what it is now.

    Args:
      run_dir: of the run.
      fingerprints: of the sources as they are.
      is_resumed: whether the run has taken steps on its data.
      allow_changes: goes on whatever has changed.
    Returns:
      What has changed, a phrase for each source; none in a run that begins, or that kept no fingerprints.
    Raises:
      InputError: the data is not what it was.
    """
    path = run_dir / "data.json"
    return agree(lambda: _compare(path, fingerprints, is_resumed=is_resumed, allow_changes=allow_changes))


def _compare(path: Path, fingerprints: Fingerprints, *, is_resumed: bool, allow_changes: bool) -> list[str]:
    """As `check_data`, in the first process."""
    now = json.loads(json.dumps(fingerprints))
    changes = _changes(_read(path), now) if is_resumed and path.exists() else []
    if changes and not allow_changes:
        raise InputError(
            f"The data is not what the run in {path.parent} began with: {'; '.join(changes)}; restore it, or go on all "
            "the same with data.allow_changes=true, where documents may come again or not at all until the epoch ends."
        )
    write_atomically(path, json.dumps(now, indent=2) + "\n")
    return changes


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text("utf-8"))
        if not isinstance(saved, dict) or not all(isinstance(entry, dict) for entry in saved.values()):
            raise ValueError("it is not a fingerprint for each source")
        return saved
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}, which says what the data of the run was, cannot be read ({error}): remove it to go on unchecked."
        ) from error


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    phrases = []
    for source in sorted(before.keys() | now.keys()):
        old, new = before.get(source, {}), now.get(source, {})
        differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if differing:
            values = ", ".join(f"{name} was {old.get(name)!r:.100} and is {new.get(name)!r:.100}" for name in differing)
            phrases.append(f"of source {source!r} {values}")
    return phrases
