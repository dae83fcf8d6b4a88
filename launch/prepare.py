"""gemma4 prepare --config=FILE_OR_NAME [--config.FIELD=VALUE ...] --out=DIR [--num_shards=N] [--workers=K]
               [--source=NAME] [--task=i/N]

Encodes the documents of a run's sources once: text as tokens, images decoded and resized to their budgets. Runs then
read OUT/SOURCE, with the kind `prepared`, and see the same batches. What a source holds back stays held out.

  gemma4 prepare --config=quickstart --out=prepared
  gemma4 prepare --config=my_config.py --out=prepared --source=pictures --workers=32
  gemma4 prepare --config=my_config.py --out=prepared --task=3/100       # every 100th shard, from number 3 on

The same command again goes on where it was stopped, and makes damaged shards anew. Jobs --task=0/N to --task=N-1/N may
run on N machines at any time, in any order; whichever ends last writes the manifest. So do the executors of datatrove,
which `Step` is for: docs/data.md has the script.
"""

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from gemma4_jax.errors import InputError
from gemma4_jax.fields import require
from gemma4_jax.files import local_path
from gemma4_jax.launch import cli, command_line


def main(arguments: Sequence[str]) -> None:
    """Prepares the sources of a run.

    Raises:
      InputError: the config, the data or the folder are not acceptable.
    """
    _prepare(arguments, print)


@dataclasses.dataclass(frozen=True)
class Step:
    """This command as a step of a datatrove pipeline: on any executor, task r of n is --task=r/n in one process.

    Attributes:
      arguments: of the command, without --task and --workers.
    """

    arguments: Sequence[str]

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Makes a part of the shards, and tells the log of the task how it goes.

        Args:
          data: of the step before, if there is any; it is not read.
          rank: of the task.
          world_size: tasks in all.
        Raises:
          InputError: as the command does.
        """
        logger = importlib.import_module("datatrove.utils.logging").logger
        _prepare([*self.arguments, f"--task={rank}/{world_size}", "--workers=1"], logger.info)


def _prepare(arguments: Sequence[str], report: Callable[[str], None]) -> None:
    given = flags.FlagValues()
    flags.DEFINE_string("out", "", "the folder to write", flag_values=given)
    flags.DEFINE_integer("num_shards", 0, "of each source; 0 goes by its size", lower_bound=0, flag_values=given)
    flags.DEFINE_integer("workers", 0, "processes; 0 is one a processor", lower_bound=0, flag_values=given)
    flags.DEFINE_string("source", "", "the only source to prepare", flag_values=given)
    flags.DEFINE_string("task", "", "i/N: only every N-th shard, from number i on", flag_values=given)
    config = command_line.from_command_line(arguments, given)
    values: dict[str, Any] = {name: given[name].value for name in ("out", "num_shards", "workers", "source", "task")}
    require(bool(values["out"]), "--out", values["out"], "the folder to write")

    from gemma4_jax.data.prepare import prepare

    out = local_path(values["out"])
    done = prepare(
        config.resolved(),
        out,
        sources=[values["source"]] if values["source"] else (),
        num_shards=values["num_shards"],
        num_workers=values["workers"] or os.cpu_count() or 1,
        part=_part(values["task"]),
        report=report,
    )
    for name, is_whole in done.items():
        report(f"prepared {out / name}" if is_whole else f"{out / name} waits for shards of other tasks")


def _part(task: str) -> tuple[int, int]:
    """(i, N) of i/N."""
    if not task:
        return 0, 1
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", task)
    if match is None or not int(match[1]) < int(match[2]):
        raise InputError(f"--task={task} is not possible: it must be i/N, with i from 0 to N - 1.")
    return int(match[1]), int(match[2])


def help_text() -> str:
    """What `gemma4 prepare --help` prints."""
    return f"{(__doc__ or '').strip()}\n\n{command_line.shipped_listing()}"


if __name__ == "__main__":
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
