"""gemma4 export RUN_DIR OUT_DIR

Writes the last checkpoint of a run as Hugging Face-format safetensors, with config.json, tokenizer and processor
files. transformers loads OUT_DIR with its stock Gemma 4 classes. An earlier export there is replaced; a folder of
anything else is left alone.

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

    from gemma4_jax.hf.save import export_run

    run_dir, out_dir = arguments
    if export_run(run_dir, out_dir):
        print(f"wrote {out_dir}")


def help_text() -> str:
    """What `gemma4 export --help` prints."""
    return (__doc__ or "").strip()


if __name__ == "__main__":
    sys.exit(cli.main(["export", *sys.argv[1:]]))
