"""The folder of a run: is it ours, may we write there, and what made it.

A run directory holds config.json (the resolved config), versions.json (what the latest start ran on), data.json (what
its data is known by), tokenizer/ (the tokenizer, and what its exports carry of a released model), metrics.jsonl,
checkpoints/, tensorboard/, report.html and summary.json; and, while a run goes on, its lock. Nothing that it began from
is needed to go on with it, or to export it, but its data.
"""

import fnmatch
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

from gemma4_jax.data.chat_templates import plain_template_of
from gemma4_jax.errors import InputError
from gemma4_jax.fields import to_dict
from gemma4_jax.files import local_path, write_atomically
from gemma4_jax.hf.processor import CARRIED_FILES
from gemma4_jax.hf.save import TOKENIZER
from gemma4_jax.processes import agree, is_first, led_by_first
from gemma4_jax.run_config import RunConfig
from gemma4_jax.tokenizer import Tokenizer

MAY_CHANGE = (
    "run_dir", "name", "mesh", "data.sources.*.path", "data.sources.*.options.files", "data.num_workers",
    "data.cache_dir", "data.cache_bytes", "data.max_left_out", "data.allow_changes", "train.num_steps",
    "train.attention", "train.experts", "train.expert_exchange", "train.remat", "checkpoint", "evaluators", "log",
    "export",
)  # fmt: skip
"""Fields, and sections, that may differ from one start of a run to the next.

They do not change what a step computes, but for train.num_steps: a run made longer follows the longer schedule from
where it stands. Data is known by what it holds and not by its place: `train.fingerprints` compares it. Sources that
nothing is drawn from may come and go.
"""

SOURCES = ("tokenizer", "init.from_hf", "init.from_run", "init.upcycle_from")
"""Fields that name places which a run needs when it begins, and never again."""

PACKAGES = ("gemma4-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
"""Packages whose versions are kept with a run."""


def run_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run: the one that its directory carries, or, when it begins, the one that its config names.

    Raises:
      InputError: there is none, or the config names another one than the run was begun with.
    """
    carried = local_path(config.run_dir) / TOKENIZER
    if not agree(lambda: carried.is_file() and (carried.parents[1] / "config.json").exists()):
        return Tokenizer.load(config.tokenizer)
    tokenizer = Tokenizer(carried.absolute())
    try:
        given = Tokenizer.load(config.tokenizer)
    except InputError:  # it was moved, and the run has its own
        return tokenizer
    if given.path.read_bytes() != carried.read_bytes():
        raise InputError(
            f"tokenizer={config.tokenizer!r} is not the one with which run_dir={config.run_dir!r} was begun: give "
            "another run_dir, or the same tokenizer to go on with that run."
        )
    return tokenizer


def open_run_dir(config: RunConfig, tokenizer: Tokenizer) -> Path:
    """Makes the run directory if need be, and writes config.json, versions.json and the tokenizer into it.

    Args:
      config: of the run.
      tokenizer: of `run_tokenizer`.
    Returns:
      Its absolute path.
    Raises:
      InputError: it cannot be written to, or holds a run of a different config.
    """
    run_dir = local_path(config.run_dir).absolute()
    with led_by_first():
        if is_first():
            _write_run_dir(config, tokenizer, run_dir)
    return run_dir


def _write_run_dir(config: RunConfig, tokenizer: Tokenizer, run_dir: Path) -> None:
    given = json.loads(json.dumps(to_dict(config)))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
        saved = run_dir / "config.json"
        if saved.exists():
            _check_same_run(run_dir, json.loads(saved.read_text("utf-8")), given)
        if not saved.exists() or not (run_dir / TOKENIZER).is_file():
            _carry_tokenizer(tokenizer, config, run_dir)
        write_atomically(saved, json.dumps(given, indent=2) + "\n")
        write_atomically(run_dir / "versions.json", json.dumps(versions(), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"run_dir={config.run_dir!r} cannot be written to ({error.strerror}): give a folder that takes new files."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"run_dir={config.run_dir!r} holds a config.json that is not JSON ({error}): give another run_dir."
        ) from error


def _carry_tokenizer(tokenizer: Tokenizer, config: RunConfig, run_dir: Path) -> None:
    """Copies tokenizer.json, and what lies beside it or, with the same tokenizer, beside the weights to begin from.

    The chat template is the one that the run trains with.
    """
    init = config.init
    content = tokenizer.path.read_bytes()
    folders = [tokenizer.path.parent]
    folders += [local_path(init.from_hf)] if init.from_hf else []
    folders += [local_path(init.from_run) / TOKENIZER.parent] if init.from_run else []
    beside: dict[str, bytes] = {}
    for folder in folders:
        same = folder / TOKENIZER.name
        if same == tokenizer.path or (same.is_file() and same.read_bytes() == content):
            found = [folder / name for name in CARRIED_FILES if (folder / name).is_file()]
            beside = {file.name: file.read_bytes() for file in found} | beside
    if (template := plain_template_of(config.data, tokenizer)) is not None:
        beside["chat_template.jinja"] = template.encode()
    target = run_dir / TOKENIZER
    target.parent.mkdir(exist_ok=True)
    for name, copied in beside.items():
        write_atomically(target.with_name(name), copied)
    write_atomically(target, content)  # last: with it, all of them are there


def _check_same_run(run_dir: Path, saved: Any, given: Mapping[str, Any]) -> None:
    if not isinstance(saved, Mapping):
        raise InputError(f"run_dir={str(run_dir)!r} holds a config.json that is not of a run: give another run_dir.")
    if "evaluators" not in saved and "eval" in saved:
        raise InputError(
            f"run_dir={str(run_dir)!r} holds a run of an earlier version of this package: go on with that version, or "
            f"begin another run_dir from the parameters of this run, with init.from_run={str(run_dir)!r}."
        )
    old, new = _flatten(_without_undrawn(saved)), _flatten(_without_undrawn(given))
    absent = object()
    differing = [
        f"{field} was {old.get(field)!r} and is now {new.get(field)!r}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field, absent) != new.get(field, absent)
        and not any(
            fnmatch.fnmatchcase(field, pattern) for allowed in MAY_CHANGE for pattern in (allowed, f"{allowed}.*")
        )
        and not (field in SOURCES and _is_same_source(field, old.get(field), new.get(field), run_dir))
    ]
    if differing:
        raise InputError(
            f"run_dir={str(run_dir)!r} holds a run of a different config ({'; '.join(differing)}): "
            "give another run_dir, or the same config to go on with that run."
        )


def _without_undrawn(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the sources of weight 0, which training does not see."""
    try:
        sources = {name: source for name, source in config["data"]["sources"].items() if source["weight"]}
        return {**config, "data": {**config["data"], "sources": sources}}
    except (LookupError, TypeError, AttributeError):
        return dict(config)


def _is_same_source(field: str, old: Any, new: Any, run_dir: Path) -> bool:
    """Whether a run may go on although this place is spelled in another way, or has moved."""
    if field == "tokenizer":  # of a run that carries its own, `run_tokenizer` has compared them
        return (run_dir / TOKENIZER).is_file()
    if not old or not new or not isinstance(old, str):
        return False
    before, now = local_path(old), local_path(new)
    return before.resolve() == now.resolve() or not before.exists()


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
