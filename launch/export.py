"""gemma4 export RUN_DIR OUT_DIR

Writes the last checkpoint of a run as Hugging Face-format safetensors, with config.json, tokenizer and processor
files. OUT_DIR must not exist yet; transformers loads it with its stock Gemma 4 classes.

  gemma4 export runs/quickstart exported
"""

import sys
from collections.abc import Sequence

from gemma4_jax.errors import InputError
from gemma4_jax.launch import cli


def main(arguments: Sequence[str]) -> None:
    """Exports one run.

    Raises:
      InputError: the arguments, the run or the destination are not acceptable.
    """
    if len(arguments) != 2 or any(argument.startswith("-") for argument in arguments):
        raise InputError(f"export takes RUN_DIR and OUT_DIR, and was given {' '.join(arguments) or 'nothing'}.")

    from gemma4_jax.hf.save import export

    run_dir, out_dir = arguments
    export(run_dir, out_dir)
    print(f"wrote {out_dir}")


def help_text() -> str:
    """What `gemma4 export --help` prints."""
    return (__doc__ or "").strip()


if __name__ == "__main__":
    sys.exit(cli.main(["export", *sys.argv[1:]]))
