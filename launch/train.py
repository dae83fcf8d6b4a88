"""gemma4 train --config=FILE_OR_NAME [--config.FIELD=VALUE ...]

Trains the run that a config describes, in its run_dir: checkpoints, metrics.jsonl, report.html, summary.json and, at
the end, an export. A run that was stopped goes on from its last checkpoint when the same command is given again; a
finished one is left as it is, and its export too.

  gemma4 train --config=quickstart
  gemma4 train --config=quickstart --config.train.num_steps=500 --config.run_dir=runs/short
  gemma4 train --config=my_config.py --config.optimizer.learning_rate=1e-4
  gemma4 train --config=my_config.py:ARGUMENT        # calls its get_config(ARGUMENT)
  gemma4 train --config=my_config.py --config.init.from_hf=CHECKPOINT --config.tokenizer=CHECKPOINT

Every field, with its default, is in the config `base`.
"""

import sys
from collections.abc import Sequence

from gemma4_jax.files import local_path
from gemma4_jax.launch import checks, cli, run_config


def main(arguments: Sequence[str]) -> None:
    """Checks the config, trains, and exports if the config says so.

    Raises:
      InputError: the config, the devices or the data are not acceptable.
    """
    config = run_config.from_command_line(arguments)

    from gemma4_jax.data.pack import RowShape
    from gemma4_jax.sharding import make_mesh

    model_config = run_config.model_config(config)
    RowShape.from_config(config.data, model_config)
    checks.check_batch(config, make_mesh(config.mesh.to_dict()).shape)

    from gemma4_jax.hf.integrity import checkpoint_steps
    from gemma4_jax.train.initialize import check_source
    from gemma4_jax.train.loop import train

    if not checkpoint_steps(local_path(config.run_dir)):  # else the run goes on from there, wherever it once began
        check_source(config.init, model_config)
    train(config, model_config)
    if config.export.at_end:
        from gemma4_jax.hf.save import export_run

        out_dir = config.export.dir or local_path(config.run_dir) / "export"
        if export_run(config.run_dir, out_dir, keeps_newer=True):
            print(f"wrote {out_dir}")


def help_text() -> str:
    """What `gemma4 train --help` prints."""
    return f"{(__doc__ or '').strip()}\n\n{run_config.shipped_listing()}"


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
