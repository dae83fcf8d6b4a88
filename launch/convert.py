"""gemma4 convert HF_DIR OUT

Writes a checkpoint in Hugging Face's format as a folder with an Orbax checkpoint, from which runs begin and which can
be exported again. OUT must not exist yet. A run can also begin from HF_DIR itself, with --config.init.from_hf=HF_DIR.

  gemma4 convert gemma-4-E2B converted
  gemma4 train --config=my_config.py --config.init.from_run=converted --config.tokenizer=converted/tokenizer
"""

import sys
from collections.abc import Sequence

from gemma4_jax.errors import InputError
from gemma4_jax.launch import cli


def main(arguments: Sequence[str]) -> None:
    """Converts one checkpoint.

    Raises:
      InputError: the arguments, the checkpoint or the destination are not acceptable.
    """
    if len(arguments) != 2 or any(argument.startswith("-") for argument in arguments):
        raise InputError(f"convert takes HF_DIR and OUT, and was given {' '.join(arguments) or 'nothing'}.")

    from gemma4_jax.hf.convert import convert

    hf_dir, out = arguments
    convert(hf_dir, out)
    print(f"wrote {out}")


def help_text() -> str:
    """What `gemma4 convert --help` prints."""
    return (__doc__ or "").strip()


if __name__ == "__main__":
    sys.exit(cli.main(["convert", *sys.argv[1:]]))
