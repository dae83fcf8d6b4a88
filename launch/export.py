"""gemma4 export RUN_DIR OUT_DIR [--dtype=float32|bfloat16]

Writes the last checkpoint of a run as Hugging Face-format safetensors, with config.json, tokenizer and processor
files. transformers loads OUT_DIR with its stock Gemma 4 classes. An earlier export there is replaced; a folder of
anything else is left alone. Without --dtype, every tensor has the dtype of the checkpoint.

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
    places = [argument for argument in arguments if not argument.startswith("--dtype=")]
    dtypes = [argument.removeprefix("--dtype=") for argument in arguments if argument not in places]
    if len(places) != 2 or len(dtypes) > 1 or any(place.startswith("-") for place in places):
        given = " ".join(arguments) or "nothing"
        raise InputError(f"export takes RUN_DIR and OUT_DIR, perhaps --dtype=DTYPE, and was given {given}.")

    from gemma4_jax.hf.save import export_run

    run_dir, out_dir = places
    if export_run(run_dir, out_dir, dtype=dtypes[0] if dtypes else None):
        print(f"wrote {out_dir}")


def help_text() -> str:
    """What `gemma4 export --help` prints."""
    return (__doc__ or "").strip()


if __name__ == "__main__":
    sys.exit(cli.main(["export", *sys.argv[1:]]))
