"""Compiles attention, forward and backward, of each kind of layer for TPUs, as docs/attention.md.

  pip install ".[tpu]"
  python benchmarks/compile_attention.py [--chip=CHIP]

No TPU is needed, and nothing is run: that it compiles says that blocks fit the vector memory, and the compiler says
what else it needs. One device has whole layers here: of a mesh each has its part of the heads.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHIPS = {
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v5p": ("v5p:2x2x1", "v5p-8"),
    "v6e": ("v6e:2x2", "v6e-4"),
    "tpu7x": ("tpu7x:2x2x1", "tpu7x-8"),
}
"""Chip -> the smallest slice that can be described, and the name by which libtpu knows it."""

LENGTHS = (8_192, 32_768)

PAGE = Path(__file__).parents[1] / "docs" / "attention.md"
FIGURES = Path(__file__).with_suffix(".json")

MARK = "## On TPU\n"

TEXT = (
    MARK
    + """
Written by `benchmarks/compile_attention.py`, which compiles attention of one row, forward and backward in bfloat16,
for {chips}, without a TPU. On TPU `auto` takes `interval`, a Pallas kernel.
It visits the blocks of keys from the first that a block of queries sees to the last, whatever bounds them: a window, a
document, an image, or how far a cache is full. Blocks are queries (times the query heads to a head of keys, all of
which are rows of one matrix) x keys, and fit the {vmem} MiB of vector memory that a kernel may take. MiB are what is
needed in HBM beside the inputs and the gradients, on the chip where that is most: copies of the queries with heads
before positions, which a model's own projections may write in that order. Nothing here has been run: these are the
compiler's figures.

| layer | heads, of keys | head dim | T | blocks | interval, MiB | blockwise, MiB |
| --- | --- | ---: | ---: | --- | ---: | ---: |
"""
)


def layers() -> dict[str, tuple[int, int, int, int | None, int | None]]:
    """Kind of layer -> (query heads, heads of keys, head dim, back, ahead) of the official sizes.

    Images let a query of 26B and 31B see ahead on sliding layers, how far is not known.
    """
    from gemma4_jax.sizes import SIZES

    kinds: dict[str, tuple[int, int, int, int | None, int | None]] = {}
    for name in ("e2b", "26b_a4b", "31b"):
        text = SIZES[name]().text
        ahead = None if text.image_blocks_bidirectional else 0
        kinds[f"{name}, sliding {text.sliding_window:,}"] = (
            text.num_heads, text.num_kv_heads, text.head_dim, text.sliding_window - 1, ahead
        )  # fmt: skip
        kinds[f"{name}, global"] = (text.num_heads, text.num_global_kv_heads, text.global_head_dim, None, 0)
    for name in ("e2b", "31b"):
        vision = SIZES[name]().vision
        kinds[f"{name}, patches"] = (vision.num_heads, vision.num_heads, vision.head_dim, None, None)
    return kinds


def temporary_bytes(chip: str) -> list[dict[str, Any]]:
    """What each layer needs on a chip; in a process of its own, for libtpu describes one slice in each."""
    described, accelerator = CHIPS[chip]
    # libtpu would ask the machine it is on about its TPUs.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": accelerator,
    }

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from gemma4_jax.ops.attention import Shape, attend, choose, interval
    from gemma4_jax.ops.attention.spans import Spans
    from gemma4_jax.ops.policy import KernelPolicy

    device = topologies.get_topology_desc(platform="tpu", topology_name=described).devices[0]

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    found = []
    for layer, (num_heads, num_kv_heads, head_dim, back, ahead) in layers().items():
        for length in LENGTHS if "patches" not in layer else (10_080,):
            choice = choose(KernelPolicy("tpu"), Shape(length, length, head_dim, back, ahead))
            blocks = interval.block_sizes(length, length, num_heads // num_kv_heads, back)
            figures = {"layer": layer, "length": length, "chosen": choice, "blocks": blocks, "bytes": {}}
            for name in (choice, "blockwise"):

                def loss(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, direction: jax.Array) -> jax.Array:
                    return jnp.vdot(attend(q, k, v, spans, implementation=name), direction)  # noqa: B023, used at once

                keys = array(1, length, num_kv_heads, head_dim)
                queries = array(1, length, num_heads, head_dim)
                bound = array(1, length, dtype=jnp.int32)
                lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
                    queries, keys, keys, Spans(bound, bound, back, ahead), queries
                )
                figures["bytes"][name] = lowered.compile().memory_analysis().temp_size_in_bytes
            print(figures, file=sys.stderr, flush=True)
            found.append(figures)
    return found


def page(figures: dict[str, list[dict[str, Any]]]) -> str:
    """The section of the page, of chip -> what each layer needs."""
    from gemma4_jax.ops.attention import interval

    text = TEXT.format(chips=", ".join(figures), vmem=interval.VMEM_BYTES // 2**20)
    for of_chips in zip(*figures.values(), strict=True):
        first = of_chips[0]
        num_heads, num_kv_heads, head_dim, *_ = layers()[first["layer"]]
        queries, keys = first["blocks"]
        group = num_heads // num_kv_heads
        cells = [first["layer"], f"{num_heads}, {num_kv_heads}", str(head_dim), f"{first['length']:,}"]
        cells += [f"{queries} (x {group}) x {keys}"]
        cells += [
            f"{max(of_chip['bytes'][name] for of_chip in of_chips) / 2**20:,.0f}" for name in ("interval", "blockwise")
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def main() -> None:
    """Compiles, and writes the section of the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, help="compile for this chip alone, and print the figures")
    chip = parser.parse_args().chip
    if chip:
        print(json.dumps(temporary_bytes(chip)))
        return
    figures = {}
    for name in CHIPS:
        command = [sys.executable, __file__, f"--chip={name}"]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures[name] = json.loads(finished.stdout.splitlines()[-1])
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    before, _, section = PAGE.read_text().partition(MARK)
    _, mark, behind = section.partition("\n## ")
    PAGE.write_text(before.rstrip() + "\n\n" + page(figures) + mark + behind)
    print(page(figures))


if __name__ == "__main__":
    main()
