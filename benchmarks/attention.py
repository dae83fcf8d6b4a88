"""What attention costs, forward and backward, beside the plain computation of it, as docs/attention.md.

  python benchmarks/attention.py [--rounds=5]

The two take turns, and the median of each is quoted. Memory is what the compiled program needs beside its inputs and
outputs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.ops.attention import attend
from gemma4_jax.ops.attention.spans import Spans, document_spans, member_spans

PAGE = Path(__file__).parents[1] / "docs" / "attention.md"
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64

TEXT = """# What attention costs

Written by `benchmarks/attention.py`: one row, {heads} heads of {dim} channels, {kv} of keys and values, forward and
backward in float32, on {device}. `reference` makes all scores of a row; `blockwise` makes a block at a time, only where
somebody sees somebody.

| | T | reference, ms | blockwise, ms | ratio | reference, MiB | blockwise, MiB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def documents(length: int, count: int, window: int | None) -> Spans:
    """Spans of a row of some documents of one length."""
    index = jnp.arange(length)[None]
    return document_spans(index % (length // count), index, window=window)


def small_image(length: int, patches: int) -> Spans:
    """Spans of a row that holds one image, and has room for more."""
    return member_spans(jnp.asarray(np.arange(length) < patches, jnp.int32)[None])


CASES: dict[str, tuple[int, Callable[[int], Spans]]] = {
    "global, one document": (4096, lambda length: documents(length, 1, None)),
    "global, eight documents": (4096, lambda length: documents(length, 8, None)),
    "sliding, window 512": (4096, lambda length: documents(length, 1, 512)),
    "an image of 56 soft tokens where 1,120 have room": (1120 * 9, lambda length: small_image(length, 56 * 9)),
}
"""What is measured -> (positions of the row, its spans)."""


def compiled(spans: Spans, length: int, implementation: str) -> tuple[Any, tuple[jax.Array, ...]]:
    """The gradient of attention, compiled, and what it takes."""
    shapes = [(1, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, direction = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(q * HEAD_DIM**-0.5, k, v, spans, implementation=implementation) * direction)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile(), (q, k, v)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Median seconds and temporary bytes of both, in turns."""
    length, make_spans = CASES[name]
    spans = make_spans(length)
    programs = {which: compiled(spans, length, which) for which in ("reference", "blockwise")}
    seconds: dict[str, list[float]] = {which: [] for which in programs}
    for _ in range(rounds + 1):
        for which, (program, inputs) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            seconds[which].append(time.perf_counter() - began)
    return {
        "length": length,
        "seconds": {which: statistics.median(times[1:]) for which, times in seconds.items()},
        "bytes": {which: program.memory_analysis().temp_size_in_bytes for which, (program, _) in programs.items()},
    }


def main() -> None:
    """Measures, and writes the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    device = jax.devices()[0].device_kind
    page, figures = TEXT.format(heads=HEADS, kv=KV_HEADS, dim=HEAD_DIM, device=device), {}
    for name in CASES:
        figures[name] = found = measure(name, rounds)
        milliseconds = [1000 * found["seconds"][which] for which in ("reference", "blockwise")]
        mebibytes = [found["bytes"][which] / 2**20 for which in ("reference", "blockwise")]
        cells = [*(f"{value:,.0f}" for value in milliseconds), f"{milliseconds[0] / milliseconds[1]:.1f}"]
        cells += [f"{value:,.0f}" for value in mebibytes]
        page += f"| {name} | {found['length']:,} | {' | '.join(cells)} |\n"
        print(page.splitlines()[-1], flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    _, mark, of_tpu = PAGE.read_text().partition("\n## On TPU\n")  # of benchmarks/compile_attention.py
    PAGE.write_text(page + mark + of_tpu)


if __name__ == "__main__":
    main()
