"""gemma4 preview --config=FILE_OR_NAME [--config.FIELD=VALUE ...] [--out=preview.html]

Shows what a run would train on, as one HTML page: the first records of every source as the model reads them, with what
carries loss underlined, images and sounds where they stand, and what is left out and why; plots of the first thousand;
and the first packed rows, with the attention mask of each, and the share of padding.

  gemma4 preview --config=quickstart --out=rows.html
"""

import sys
from collections.abc import Sequence

from absl import flags

from gemma4_jax.files import local_path
from gemma4_jax.launch import cli, command_line


def main(arguments: Sequence[str]) -> None:
    """Writes the page.

    Raises:
      InputError: the config, the data or the place of the page are not acceptable.
    """
    command_flags = flags.FlagValues()
    flags.DEFINE_string("out", "preview.html", "the page to write", flag_values=command_flags)
    config = command_line.from_command_line(arguments, command_flags)

    from gemma4_jax.data.preview import preview

    out = str(local_path(str(command_flags["out"].value)))
    preview(config.resolved(), out, lambda sentence: print(sentence, file=sys.stderr, flush=True))
    print(f"wrote {out}")


def help_text() -> str:
    """What `gemma4 preview --help` prints."""
    return f"{(__doc__ or '').strip()}\n\n{command_line.shipped_listing()}"


if __name__ == "__main__":
    sys.exit(cli.main(["preview", *sys.argv[1:]]))
