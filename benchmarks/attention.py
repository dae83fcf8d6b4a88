"""What attention costs, forward and backward, beside plain computations of it, as docs/attention.md.

  python benchmarks/attention.py [--rounds=5]

What is compared takes turns, and the fastest run of each is quoted: what else the machine does can only slow a run
down. Memory is what the compiled program needs beside its inputs and outputs.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.ops.attention import Shape, attend, choose
from gemma4_jax.ops.attention.spans import Spans, document_spans, member_spans
from gemma4_jax.ops.policy import KernelPolicy

PAGE = Path(__file__).parents[1] / "docs" / "attention.md"
HEADS, KV_HEADS, HEAD_DIM, WINDOW = 4, 2, 64, 512
LENGTHS = 4096, 8192, 16384, 32768, 65536
UNITS = {"seconds": 1000, "bytes": 2**-20}
"""Of the tables: milliseconds and MiB."""

TEXT = """# What attention costs

Written by `benchmarks/attention.py`: one row, {heads} heads of {dim} channels, {kv} of keys and values, forward and
backward in float32, on {device}. `reference` makes all scores of a row, and masks them; `dot_product_attention` is that
of jax.nn, causal; `auto` is what a model takes: `banded` for windows, and for the rest `blockwise`, which makes a block
of scores at a time, only where somebody sees somebody.
"""


class Case(NamedTuple):
    """Something that is measured.

    Attributes:
      length: positions of the row.
      spans: who sees whom.
      implementation: a key of IMPLEMENTATIONS, "auto", or "dot_product_attention".
      heads: of queries and of keys.
    """

    length: int
    spans: Spans
    implementation: str
    heads: tuple[int, int] = (HEADS, KV_HEADS)


def documents(length: int, count: int = 1, window: int | None = None) -> Spans:
    """Spans of a row of some documents of one length."""
    index = jnp.arange(length)[None]
    return document_spans(index % (length // count), index, window=window)


def small_image(length: int, patches: int) -> Spans:
    """Spans of a row that holds one image, and has room for more."""
    return member_spans(jnp.asarray(np.arange(length) < patches, jnp.int32)[None])


def compiled(case: Case) -> tuple[Any, tuple[jax.Array, ...]]:
    """The gradient of attention, compiled, and what it takes."""
    length, spans, name, (heads, kv_heads) = case
    shapes = [(1, length, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, direction = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    if name == "auto":
        name = choose(KernelPolicy(), Shape(length, length, HEAD_DIM, spans.back, spans.ahead))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, direction: jax.Array) -> jax.Array:
        if name == "dot_product_attention":
            out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            out = attend(q * HEAD_DIM**-0.5, k, v, spans, implementation=name)
        return jnp.sum(out * direction)

    inputs = q, k, v, direction
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile(), inputs


def measure(cases: list[Case], rounds: int) -> list[dict[str, float]]:
    """Seconds of the fastest run of each, in turns, and temporary bytes; without rounds, the bytes alone."""
    programs = [compiled(case) for case in cases]
    found = [
        {"length": case.length, "seconds": math.inf, "bytes": program.memory_analysis().temp_size_in_bytes}
        for case, (program, _) in zip(cases, programs, strict=True)
    ]
    for _ in range(rounds):
        for figures, (program, inputs) in zip(found, programs, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            figures["seconds"] = min(figures["seconds"], time.perf_counter() - began)
    return found


def comparisons() -> dict[str, list[Case]]:
    """What is measured -> (the plain computation, ours)."""

    def both(length: int, spans: Spans, plain: str = "reference", heads: tuple[int, int] = (HEADS, KV_HEADS)) -> list:
        return [Case(length, spans, which, heads) for which in (plain, "auto")]

    image = small_image(1120 * 9, 56 * 9)
    return {
        "global, one document, beside `dot_product_attention`": both(4096, documents(4096), "dot_product_attention"),
        "global, one document, beside `reference`": both(4096, documents(4096)),
        "global, eight documents, beside `reference`": both(4096, documents(4096, 8)),
        "sliding, beside `reference`": both(4096, documents(4096, window=WINDOW)),
        "sliding, one head, beside `reference`": both(16384, documents(16384, window=WINDOW), heads=(1, 1)),
        "an image of 56 soft tokens where 1,120 have room, beside `reference`": both(1120 * 9, image),
        "global, eight documents beside one": [Case(16384, documents(16384, count), "auto") for count in (1, 8)],
    }


def row_of(name: str, found: list[dict[str, float]]) -> str:
    """A line of the table of comparisons."""
    milliseconds, mebibytes = ([figures[key] * scale for figures in found] for key, scale in UNITS.items())
    cells = [f"{found[0]['length']:,}", *(f"{x:,.0f}" for x in milliseconds)]
    cells += [f"{milliseconds[0] / milliseconds[1]:.1f}", *(f"{x:,.0f}" for x in mebibytes)]
    return f"| {name} | {' | '.join(cells)} |\n"


def exponent(found: list[dict[str, float]], key: str) -> float:
    """e of figure ~ length^e, between the shortest and the longest row."""
    return math.log(found[-1][key] / found[0][key]) / math.log(found[-1]["length"] / found[0]["length"])


def growth(rounds: int) -> tuple[str, dict[str, Any]]:
    """The table of rows of growing length, and its figures."""
    sliding = [measure([Case(n, documents(n, window=WINDOW), "auto")], rounds)[0] for n in LENGTHS]
    whole = [measure([Case(n, documents(n), "auto")], 0)[0] for n in LENGTHS]
    page = (
        "\nLonger rows of one document. From the first to the last, figures grow as T^e: "
        f"the time of sliding layers (window {WINDOW})\nwith e = {exponent(sliding, 'seconds'):.2f}, their memory with "
        f"{exponent(sliding, 'bytes'):.2f}, that of global layers with {exponent(whole, 'bytes'):.2f}.\n\n"
        "| T | sliding, ms | sliding, MiB | global, MiB |\n| ---: | ---: | ---: | ---: |\n"
    )
    for of_sliding, of_whole in zip(sliding, whole, strict=True):
        mebibytes = [of_sliding["bytes"] / 2**20, of_whole["bytes"] / 2**20]
        cells = [f"{of_sliding['length']:,}", f"{1000 * of_sliding['seconds']:,.0f}", *(f"{x:,.0f}" for x in mebibytes)]
        page += f"| {' | '.join(cells)} |\n"
    return page, {"sliding": sliding, "global": whole}


def main() -> None:
    """Measures, and writes the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    device = jax.devices()[0].device_kind
    page, figures = TEXT.format(heads=HEADS, kv=KV_HEADS, dim=HEAD_DIM, device=device), {}
    page += "\n| | T | plain, ms | ours, ms | ratio | plain, MiB | ours, MiB |\n"
    page += "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    for name, cases in comparisons().items():
        figures[name] = found = measure(cases, rounds)
        page += row_of(name, found)
        print(page.splitlines()[-1], flush=True)
    more, figures["growth"] = growth(rounds)
    print(more)
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    _, mark, of_tpu = PAGE.read_text().partition("\n## On TPU\n")  # of benchmarks/compile_attention.py
    PAGE.write_text(page + more + mark + of_tpu)


if __name__ == "__main__":
    main()
