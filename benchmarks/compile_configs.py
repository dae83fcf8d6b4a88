"""Compiles the training step of the shipped configs, and of longer rows, for described TPUs, as docs/compiled.md.

  pip install ".[tpu]"
  python benchmarks/compile_configs.py [--plan] [NAME ...]

No TPU is needed: libtpu compiles for a slice that is described to it, which takes minutes a config. What does not fit
the memory of a chip, or the network of a slice, does not compile. Given names, it compiles these alone, and leaves the
other lines of the page as they are. With --plan it stops where every buffer has its place and only the code of the
kernels is left to be written, which is most of the time.
"""

import argparse
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from collectives import SENT, sent_bytes
from least_sent import PARTS, least_sent


class Case(NamedTuple):
    """A config with overrides, and the slice of TPUs that it is for."""

    config: str
    slice_name: str
    overrides: dict[str, Any]


def _rows(tokens: int, rows: int, chunk: int, microbatches: int = 1, **mesh: int) -> dict[str, Any]:
    """Overrides for rows of another length."""
    data = {"data.seq_len": tokens, "data.batch_size": rows}
    train = {"train.loss_chunk": chunk, "train.grad_accum_steps": microbatches}
    return data | train | {f"mesh.{axis}": size for axis, size in mesh.items()}


CASES = {
    "pretrain_small": Case("pretrain_small", "v5p:1x1x1", {}),
    "pretrain_e2b": Case("pretrain_e2b", "v5p:4x4x4", {}),
    "finetune_e4b_long": Case("finetune_e4b_long", "v5p:4x4x4", {}),
    "finetune_26b_a4b": Case("finetune_26b_a4b", "v5p:4x4x4", {}),
    "pretrain_31b": Case("pretrain_31b", "v5p:4x8x8", {}),
    "finetune_31b_long": Case("finetune_31b_long", "v5p:4x8x8", {}),
    "e2b_32k": Case("pretrain_e2b", "v5p:4x4x4", _rows(32768, 32, 2048, context=2)),
    "e2b_128k": Case("pretrain_e2b", "v5p:4x4x4", _rows(131072, 8, 8192, fsdp=8, context=8)),
    "e4b_8k": Case("finetune_e4b_long", "v5p:4x4x4", _rows(8192, 64, 1024, context=1)),
    "e4b_32k": Case("finetune_e4b_long", "v5p:4x4x4", _rows(32768, 32, 2048, context=2)),
    "26b_a4b_8k": Case("finetune_26b_a4b", "v5p:4x4x4", _rows(8192, 64, 1024)),
    "26b_a4b_8k_v6e": Case("finetune_26b_a4b", "v6e:16x16", _rows(8192, 256, 1024, fsdp=16)),
    "26b_a4b_32k": Case("finetune_26b_a4b", "v5p:4x4x4", _rows(32768, 32, 2048, fsdp=4, context=2)),
    "26b_a4b_128k": Case("finetune_26b_a4b", "v5p:4x4x8", _rows(131072, 16, 8192, fsdp=2, context=8)),
    "26b_a4b_256k": Case("finetune_26b_a4b", "v5p:4x8x8", _rows(262144, 16, 16384, fsdp=2, context=16)),
    "31b_8k_tensor": Case("pretrain_31b", "v5p:4x8x8", _rows(8192, 512, 512, 4, tensor=4)),
    "31b_32k": Case("pretrain_31b", "v5p:4x8x8", _rows(32768, 128, 2048, context=2)),
    "31b_128k": Case("finetune_31b_long", "v5p:4x8x8", _rows(131072, 32, 8192, fsdp=32, context=8)),
}
"""Name of a line -> what is compiled: the shipped configs first, then the same with rows of other lengths."""

PAGE = Path(__file__).parents[1] / "docs" / "compiled.md"
FIGURES = Path(__file__).with_suffix(".json")

TEXT = """# What the shipped configs take on the TPUs they are for

Written by `benchmarks/compile_configs.py`, which compiles the training step of each for a described slice, without a
TPU. GiB a chip, of the 95 of a v5p and the 31 of a v6e: parameters, the optimizer's moments and the batch, what the
step needs beside them, and the sum. Seconds are those of the compiler on two shared cores of a CPU. Attention is what
each kind of layer got, sliding, global, and patches. Of a step that is "planned" every buffer has its place, and its
code was not written. Below the shipped configs are the same with rows of other lengths, and on another slice. Nothing
here has been run: these are the compiler's figures.
"""

MEMORY = ("parameters", "moments", "batch", "temporary", "together")
COLUMNS = (
    "config", "slice", "mesh", "rows x tokens", "microbatches", "images", "attention", "seconds", *MEMORY,
)  # fmt: skip

SENT_TEXT = """
## What a chip sends

GB in one step, by kind of collective, counted in the compiled program with its loops.
"""

SENT_COLUMNS = ("config", *SENT, "together")

LEAST_TEXT = """
## Beside the least on paper

GB that a chip sends in one step, over the least that a step of its kind can do with, where experts are spread over
devices. The least is counted by `benchmarks/least_sent.py`: weights are gathered over `fsdp` in the forward pass and in
the backward pass, and their gradients scattered; tokens go to the experts and come back, forward and backward, and go
there once more in the backward pass, which has not kept them; in bfloat16, and by the exchange `gather`.

What 26b_a4b_8k sends above it, on v5p and on v6e: dense weights a third time, for each of the two products of the
backward pass gathers its own (2.6 and 2.8 GB); the gradient of final hidden states in float32 (0.3 and 0.7); that of
the vocabulary over `expert` and `data` twice, for the rows that are looked up and for the loss (0.6 and 0.3); and what
`data` adds up of experts, in float32 (0.4 on v6e). Of longer rows, what attention sends over `context` is not in the
least.
"""

LEAST_COLUMNS = ("config", *SENT, "together", "ratio")

PARTS_TEXT = """
The least by what it is for, all kinds of collective together:
"""

PARTS_COLUMNS = ("config", *PARTS, "together")


class _Choices(logging.Handler):
    """The implementations of attention that are logged while a program is traced, by kind of layer."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.chosen: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("Attention of"):
            shape, _, chosen, *_ = record.args  # type: ignore[misc]
            kind = "patches" if shape.num_keys != self.num_tokens else "global" if shape.back is None else "sliding"
            self.chosen[kind] = chosen


def figures_of(name: str, *, is_plan: bool) -> dict[str, Any]:
    """The compiler's figures of one case; in a process of its own, for libtpu describes one slice in each."""
    case = CASES[name]
    generation, _, sides = case.slice_name.partition(":")
    shape = [int(side) for side in sides.split("x")]
    # The smallest slice that can be described is a board of four.
    described = case.slice_name if math.prod(shape) >= 4 else "v5p:2x2x1"
    # libtpu would ask the machine it is on about its TPUs; v5p counts two cores a chip, v6e one.
    cores = (2 if generation == "v5p" else 1) * max(math.prod(shape), 4)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{generation}-{cores}",
    }

    from jax.experimental import topologies

    from gemma4_jax.launch import command_line
    from gemma4_jax.sharding import make_mesh
    from gemma4_jax.train.program import make_program

    overrides = [f"--config.{field}={value}" for field, value in case.overrides.items()]
    config = command_line.from_command_line([f"--config={case.config}", *overrides])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=described)
    mesh = make_mesh(vars(config.mesh), topology.devices[: math.prod(shape)])
    program = make_program(config, mesh)
    choices = _Choices(config.data.seq_len)
    logging.getLogger().addHandler(choices)
    logging.getLogger().setLevel(logging.INFO)
    batch = program.abstract_batch(config.data.batch_size)
    seconds, together, text = _plan(program, batch) if is_plan else _compile(program, batch)
    state = program.state
    held = {"parameters": (state.trained, state.frozen), "moments": state.opt_state, "batch": batch}
    bytes_held = {kind: _bytes_a_chip(arrays) for kind, arrays in held.items()}
    return {
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "rows": config.data.batch_size,
        "tokens": config.data.seq_len,
        "microbatches": config.train.grad_accum_steps,
        "images": config.data.images_per_row,
        "attention": choices.chosen,
        "seconds": seconds,
        **bytes_held,
        # The new state takes the place of the one that is given.
        "temporary": together - sum(bytes_held.values()),
        "together": together,
        "sent": sent_bytes(text),
        "least": least_sent(program) if mesh.shape["expert"] > 1 and mesh.shape["tensor"] == 1 else None,
    }


def _compile(program: Any, batch: Any) -> tuple[float | None, int, str]:
    """(Seconds, bytes of a chip at the peak, the program's text) of the step, compiled to its end."""
    from gemma4_jax.train.program import compile_step

    began = time.perf_counter()
    compiled = compile_step(program, len(batch.tokens))
    return time.perf_counter() - began, compiled.memory_analysis().peak_memory_in_bytes, compiled.as_text()


def _plan(program: Any, batch: Any) -> tuple[float | None, int, str]:
    """The same without the seconds, from what the compiler writes down when every buffer has its place."""
    import jax

    folder = Path(tempfile.mkdtemp())

    def compile_it() -> None:
        with jax.set_mesh(program.mesh):
            lowered = program.train_step.lower(program.state, batch)
        lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})

    thread = threading.Thread(target=compile_it, daemon=True)
    thread.start()
    while thread.is_alive() and not list(folder.glob("*after_buffer_assignment.txt")):
        time.sleep(1)
    time.sleep(5)  # until they are written to their end
    report, text = (next(folder.glob(f"*{end}.txt")) for end in ("memory-usage-report", "after_buffer_assignment"))
    together = int(re.search(r"color=0\)\nTotal bytes: (\d+)", report.read_text())[1])
    program_text = text.read_text()
    shutil.rmtree(folder, ignore_errors=True)
    return None, together, program_text


def _bytes_a_chip(arrays: Any) -> int:
    """Bytes that a chip holds of abstract arrays."""
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)
    )


def row(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def head(columns: Sequence[str], num_words: int) -> list[str]:
    """The first lines of a table, whose columns are figures but for some of the first."""
    return [row(columns), row(["---"] * num_words + ["---:"] * (len(columns) - num_words))]


def line(name: str, figures: dict[str, Any]) -> str:
    """A line of the table of memory."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items()) or "one chip"
    counts = [f"{figures['rows']} x {figures['tokens']:,}", str(figures["microbatches"]), str(figures["images"])]
    attention = ", ".join(figures["attention"].get(kind, "-") for kind in ("sliding", "global", "patches"))
    seconds = "planned" if figures["seconds"] is None else f"{figures['seconds']:,.0f}"
    memory = [f"{figures[kind] / 2**30:.1f}" for kind in MEMORY]
    return row([name, CASES[name].slice_name, sizes, *counts, attention, seconds, *memory])


def sent_line(name: str, figures: dict[str, Any]) -> str:
    """A line of the table of collectives."""
    sent = [figures["sent"].get(kind, 0) for kind in SENT]
    return row([name, *(f"{size / 1e9:.1f}" for size in (*sent, sum(sent)))])


def least_line(name: str, figures: dict[str, Any]) -> str | None:
    """A line of the table of what is sent over the least."""
    if figures["least"] is None:
        return None
    least: Counter[str] = sum((Counter(part) for part in figures["least"].values()), Counter())
    sent = figures["sent"]
    cells = [f"{sent.get(kind, 0) / 1e9:.1f} / {least[kind] / 1e9:.1f}" for kind in SENT]
    total, of_paper = sum(sent.values()), sum(least.values())
    return row([name, *cells, f"{total / 1e9:.1f} / {of_paper / 1e9:.1f}", f"{total / of_paper:.2f}"])


def parts_line(name: str, figures: dict[str, Any]) -> str | None:
    """A line of the table of the least by part."""
    if figures["least"] is None:
        return None
    parts = [sum(figures["least"][part].values()) for part in PARTS]
    return row([name, *(f"{size / 1e9:.1f}" for size in (*parts, sum(parts)))])


class Table(NamedTuple):
    """A table of the page, with a line for each case.

    Attributes:
      text: that stands before it.
      columns: of it.
      num_words: columns of words, before those of figures.
      line: (name, figures) -> its line of a case, or None where it has none.
    """

    text: str
    columns: Sequence[str]
    num_words: int
    line: Callable[[str, dict[str, Any]], str | None]


MEMORY_TABLE = Table(TEXT, COLUMNS, 7, line)
TABLES = (
    MEMORY_TABLE,
    Table(SENT_TEXT, SENT_COLUMNS, 1, sent_line),
    Table(LEAST_TEXT, LEAST_COLUMNS, 1, least_line),
    Table(PARTS_TEXT, PARTS_COLUMNS, 1, parts_line),
)


def lines_of(table: Table, page: str, figures: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Name of a case -> its line: of what was compiled now, or as it stands on the page."""
    before = page.partition(row(table.columns))[2].partition("\n\n")[0]
    found = {name: f"| {name} {rest}" for name, rest in re.findall(r"^\| (\w+) (\|.*)$", before, re.MULTILINE)}
    known = found | {name: made for name, given in figures.items() if (made := table.line(name, given))}
    return {name: known[name] for name in CASES if name in known}


def write_page(figures: dict[str, dict[str, Any]]) -> None:
    """The page, with the lines of what was compiled now; the others stay as they are on it."""
    page = PAGE.read_text()
    parts = []
    for table in TABLES:
        lines = lines_of(table, page, figures)
        missing = [name for name in CASES if name not in lines] if table is MEMORY_TABLE else []
        note = f"\n\nNot compiled yet: {', '.join(missing)}." if missing else ""
        parts.append("\n".join([table.text, *head(table.columns, table.num_words), *lines.values()]) + note + "\n")
    PAGE.write_text("".join(parts))


def main() -> None:
    """Compiles, and writes the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="compile these, and write their lines of the page")
    parser.add_argument("--only", choices=CASES, help="compile this one alone, in this process, and print its figures")
    parser.add_argument("--plan", action="store_true", help="stop where every buffer has its place")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(figures_of(given.only, is_plan=given.plan)), flush=True)
        os._exit(0)  # the compiler of a plan goes on
    for name in given.names:
        if name not in CASES:
            parser.error(f"{name!r} is none of {', '.join(CASES)}")
    figures = {}
    for name in given.names or CASES:
        command = [sys.executable, __file__, f"--only={name}", *(["--plan"] if given.plan else [])]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures[name] = json.loads(finished.stdout.splitlines()[-1])
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
        write_page(figures)
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
