"""gemma4 train --config=FILE_OR_NAME [--config.FIELD=VALUE ...] [--distributed]

Trains the run that a config describes, in its run_dir: checkpoints, metrics.jsonl, report.html, summary.json and, at
the end, an export. A run that was stopped goes on from its last checkpoint when the same command is given again; a
finished one is left as it is, and its export too.

  gemma4 train --config=quickstart
  gemma4 train --config=quickstart --config.train.num_steps=500 --config.run_dir=runs/short
  gemma4 train --config=my_config.py --config.optimizer.learning_rate=1e-4
  gemma4 train --config=my_config.py:ARGUMENT        # calls its get_config(ARGUMENT)
  gemma4 train --config=my_config.py --config.init.from_hf=CHECKPOINT --config.tokenizer=CHECKPOINT

`gemma4 fields` tells every field, with its default.
--distributed: this is one of several processes, which find each other by their cluster (TPU slice, SLURM, Open MPI,
Kubernetes) or by JAX_COORDINATOR_ADDRESS=HOST:PORT of the first, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import sys
from collections.abc import Sequence

from absl import flags

from gemma4_jax.files import local_path
from gemma4_jax.launch import cli, command_line


def main(arguments: Sequence[str]) -> None:
    """Checks the config, trains, and exports if the config says so.

    Raises:
      InputError: the config, the devices or the data are not acceptable.
    """
    given = flags.FlagValues()
    flags.DEFINE_bool("distributed", False, "whether this is one of several processes", flag_values=given)
    config = command_line.from_command_line(arguments, given)

    from gemma4_jax.checkpoints.integrity import checkpoint_steps
    from gemma4_jax.data.pack import RowShape
    from gemma4_jax.processes import agree, initialize
    from gemma4_jax.sharding import make_mesh
    from gemma4_jax.train.initialize import check_source
    from gemma4_jax.train.loop import train
    from gemma4_jax.train.program import resolve

    # Asked for, and not whenever there is a cluster: one is found in any pod of Kubernetes and any step of SLURM, also
    # where a single process is meant, which would then wait for others that never come.
    if given["distributed"].value:
        initialize()
    resolved = resolve(config, make_mesh(vars(config.mesh)))
    RowShape.from_config(resolved.data, resolved.model)
    if not agree(lambda: checkpoint_steps(local_path(config.run_dir))):  # else the run goes on, wherever it once began
        check_source(config)
    train(config)
    if config.export.at_end:
        from gemma4_jax.hf.save import export_run

        out_dir = config.export.dir or local_path(config.run_dir) / "export"
        if export_run(config.run_dir, out_dir, keeps_newer=True):
            print(f"wrote {out_dir}")


def help_text() -> str:
    """What `gemma4 train --help` prints."""
    return f"{(__doc__ or '').strip()}\n\n{command_line.shipped_listing()}"


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
