"""gemma4 check RUN_DIR

Reads every checkpoint of a run and compares its files with the checksums that were written with them. Nothing is
changed. Exit status 2 says that one is damaged.

  gemma4 check runs/quickstart
"""

import sys
from collections.abc import Sequence

from gemma4_jax.errors import InputError
from gemma4_jax.launch import cli


def main(arguments: Sequence[str]) -> None:
    """Checks one run.

    Raises:
      InputError: the argument is not acceptable, there is no checkpoint, or one is damaged.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise InputError(f"check takes one RUN_DIR, and was given {' '.join(arguments) or 'nothing'}.")

    from gemma4_jax.files import local_path
    from gemma4_jax.hf.integrity import checkpoint_steps, verify

    run_dir = local_path(arguments[0])
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise InputError(f"{run_dir} holds no checkpoint: give the directory of a run.")
    damaged = []
    for step in steps:
        verdict = verify(run_dir / "checkpoints" / str(step))
        if verdict.damage is not None:
            damaged.append(str(step))
            print(f"step {step}: damaged, {verdict.damage}")
        elif verdict.by:
            size = f"{verdict.num_files:,} files of {verdict.num_bytes / 1e6:,.1f} MB"
            print(f"step {step}: intact, {size} compared by their {verdict.by}")
        else:
            print(f"step {step}: unknown, it was written without checksums")
    if damaged:
        of = f"{len(damaged)} of {len(steps)} checkpoints in {run_dir}"
        raise InputError(f"{of} are damaged (step {', '.join(damaged)}): a run goes on from the newest intact one.")


def help_text() -> str:
    """What `gemma4 check --help` prints."""
    return (__doc__ or "").strip()


if __name__ == "__main__":
    sys.exit(cli.main(["check", *sys.argv[1:]]))
