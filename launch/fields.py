"""gemma4 fields [BEGINNING]

Tells the fields of a run config, each with its default and its meaning: all of them, or those whose dotted path begins
like this. Those of the architecture, model.*, are in gemma4_jax/config.py.

  gemma4 fields optimizer
"""

import sys
import textwrap
from collections.abc import Sequence

from gemma4_jax.errors import InputError
from gemma4_jax.fields import describe, leaf_names, nearest
from gemma4_jax.launch import cli
from gemma4_jax.run_config import RunConfig


def main(arguments: Sequence[str]) -> None:
    """Prints the fields.

    Raises:
      InputError: no field begins like this.
    """
    if len(arguments) > 1:
        raise InputError(f"fields takes one BEGINNING at most, and was given {' '.join(arguments)}.")
    beginning = arguments[0] if arguments else ""
    found = [line for line in describe(RunConfig) if line.startswith(beginning)]
    if not found:
        near = nearest(beginning, leaf_names(RunConfig))
        raise InputError(f"{beginning!r} is not possible: no field begins like this, the nearest is {near}.")
    for line in found:
        print(textwrap.fill(line, width=100, subsequent_indent="    "))


def help_text() -> str:
    """What `gemma4 fields --help` prints."""
    return (__doc__ or "").strip()


if __name__ == "__main__":
    sys.exit(cli.main(["fields", *sys.argv[1:]]))
