"""Compiles the training step of the shipped configs for the TPUs that they name, as docs/compiled.md.

  pip install ".[tpu]"
  python benchmarks/compile_configs.py [--only=NAME]

No TPU is needed: libtpu compiles for a slice that is described to it, which takes minutes a config. What does not fit
the memory of a chip, or the network of a slice, does not compile.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SLICES = {
    "pretrain_small": "v5p:1x1x1",
    "pretrain_e2b": "v5p:4x4x4",
    "finetune_26b_a4b": "v5p:4x4x4",
    "pretrain_31b": "v5p:4x8x8",
}
"""Config -> the slice of TPUs that it is for."""

PAGE = Path(__file__).parents[1] / "docs" / "compiled.md"
FIGURES = Path(__file__).with_suffix(".json")

TEXT = """# What the shipped configs take on the TPUs they are for

Written by `benchmarks/compile_configs.py`, which compiles the training step of each for a described slice, without a
TPU. GiB a chip, of the 95 of a v5p: the state of the run and its batch, what the step needs beside them, and the sum.
Nothing here has been run: these are the compiler's figures.

| config | slice | mesh | rows x tokens | microbatches | state and batch | temporary | together |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |
"""


def figures_of(name: str) -> dict[str, Any]:
    """The compiler's figures of one config; in a process of its own, for libtpu describes one slice in each."""
    shape = [int(side) for side in SLICES[name].partition(":")[2].split("x")]
    # The smallest slice that can be described is a board of four.
    described = SLICES[name] if math.prod(shape) >= 4 else "v5p:2x2x1"
    # libtpu would ask the machine it is on about its TPUs; v5p counts two cores a chip.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"v5p-{2 * max(math.prod(shape), 4)}",
    }

    from jax.experimental import topologies

    from gemma4_jax.launch import command_line
    from gemma4_jax.sharding import make_mesh
    from gemma4_jax.train.program import compile_step, make_program

    config = command_line.from_command_line([f"--config={name}"])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=described)
    mesh = make_mesh(vars(config.mesh), topology.devices[: math.prod(shape)])
    program = make_program(config, mesh)
    began = time.perf_counter()
    memory = compile_step(program, config.data.batch_size).memory_analysis()
    return {
        "seconds": time.perf_counter() - began,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "rows": config.data.batch_size,
        "tokens": config.data.seq_len,
        "microbatches": config.train.grad_accum_steps,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        # The step's output takes the place of the state it is given.
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


def line(name: str, figures: dict[str, Any]) -> str:
    """A line of the table."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items()) or "one chip"
    held = figures["arguments"] + figures["output"]
    memory = [f"{value / 2**30:.1f}" for value in (held, figures["temporary"], held + figures["temporary"])]
    rows = f"{figures['rows']} x {figures['tokens']:,}"
    return f"| {' | '.join([name, SLICES[name], sizes, rows, str(figures['microbatches']), *memory])} |\n"


def main() -> None:
    """Compiles, and writes the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=SLICES, help="compile this config alone, in this process, and print its figures"
    )
    only = parser.parse_args().only
    if only:
        print(json.dumps(figures_of(only)))
        return
    figures = {}
    for name in SLICES:
        command = [sys.executable, __file__, f"--only={name}"]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures[name] = json.loads(finished.stdout.splitlines()[-1])
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    PAGE.write_text(TEXT + "".join(line(name, figures[name]) for name in SLICES))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
