"""gemma4 check FOLDER

Reads every checkpoint of a run, or what `gemma4 prepare` made of a source, and compares its files with the checksums
that were written with them. Nothing is changed. Exit status 2 says that one is damaged.

  gemma4 check runs/quickstart
  gemma4 check prepared/pictures
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from gemma4_jax.errors import InputError
from gemma4_jax.launch import cli


def main(arguments: Sequence[str]) -> None:
    """Checks one run, or one source that was prepared.

    Raises:
      InputError: the argument is not acceptable, there is nothing to check, or something is damaged.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise InputError(f"check takes one folder, and was given {' '.join(arguments) or 'nothing'}.")

    from gemma4_jax.checkpoints.integrity import FROZEN, checkpoint_steps, verify
    from gemma4_jax.data.prepared import MANIFEST
    from gemma4_jax.files import local_path

    run_dir = local_path(arguments[0])
    if (run_dir / MANIFEST).is_file():
        _check_prepared(run_dir)
        return
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise InputError(f"{run_dir} holds no checkpoint: give the directory of a run.")
    folders = {f"step {step}": run_dir / "checkpoints" / str(step) for step in steps}
    if (run_dir / FROZEN).exists():
        folders = {"frozen, shared by all": run_dir / FROZEN} | folders
    damaged = []
    for name, folder in folders.items():
        verdict = verify(folder)
        if verdict.damage is not None:
            damaged.append(name)
            print(f"{name}: damaged, {verdict.damage}")
        elif verdict.by:
            size = f"{verdict.num_files:,} files of {verdict.num_bytes / 1e6:,.1f} MB"
            print(f"{name}: intact, {size} compared by their {verdict.by}")
        else:
            print(f"{name}: unknown, it was written without checksums")
    if damaged:
        of = f"{len(damaged)} of {len(folders)} checkpoints in {run_dir}"
        raise InputError(f"{of} are damaged ({'; '.join(damaged)}): a run goes on from the newest intact one.")


def _check_prepared(folder: Path) -> None:
    from gemma4_jax.data.prepared import damage, read_manifest, shards_in

    manifest = read_manifest(folder)
    damaged = []
    for shard, known in shards_in(folder, manifest):
        if (clause := damage(shard, known, by_checksum=True)) is not None:
            damaged.append(clause)
            print(clause)
    if damaged:
        raise InputError(f"{len(damaged)} shards of {folder} are damaged: delete these files, and prepare it again.")
    num_bytes = sum(file["bytes"] for shard in manifest["shards"] for file in shard["files"].values())
    print(f"intact, {len(manifest['shards'])} shards of {num_bytes / 1e6:,.1f} MB compared by their checksums")


def help_text() -> str:
    """What `gemma4 check --help` prints."""
    return (__doc__ or "").strip()


if __name__ == "__main__":
    sys.exit(cli.main(["check", *sys.argv[1:]]))
