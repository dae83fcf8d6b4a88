"""What the loss costs, forward and backward, beside all logits at once: docs/step.md.

  python benchmarks/loss.py [--rounds=3]

The naive one is compiled for all tokens, which says what memory it would take, and run with as many as fit. The two
take turns, and the fastest run of each is quoted.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax.ops.cross_entropy import Head, total_log_prob, vocabulary_logits

PAGE = Path(__file__).parents[1] / "docs" / "step.md"
MARK = "\n## The loss\n"
VOCAB, DIM, CAP, CHUNK = 262144, 256, 30.0, 1024
TOKENS, TIMED_TOKENS = 16384, 2048

TEXT = """
Written by `benchmarks/loss.py`: the loss of a vocabulary of {vocab:,} and a width of {dim}, soft-capped, forward and
gradient in float32 on CPU; ours with the logits of {chunk:,} tokens at a time. Memory is what the compiled program
needs beside its inputs and gradients; of the naive loss with {tokens:,} tokens it is the compiler's figure, for this
machine cannot hold it, so time is that of {timed:,} tokens.

| | ours | naive | ratio |
| --- | ---: | ---: | ---: |
"""


def naive(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss by way of all logits."""
    log_probs = jax.nn.log_softmax(vocabulary_logits(hidden, Head(table, CAP)))
    return -jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], axis=-1))


def ours(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of this package."""
    return -total_log_prob(hidden, Head(table, CAP), targets, jnp.ones(targets.shape), chunk=CHUNK)[0]


def compiled(loss: Callable[..., jax.Array], tokens: int) -> Any:
    """The gradient of a loss, compiled for one row."""
    shapes = [((1, tokens, DIM), jnp.float32), ((VOCAB, DIM), jnp.float32), ((1, tokens), jnp.int32)]
    given = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*given).compile()


def seconds(rounds: int) -> dict[str, float]:
    """Of the fastest run of each, in turns."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, TIMED_TOKENS, DIM))
    table = DIM**-0.5 * jax.random.normal(keys[1], (VOCAB, DIM))
    targets = jax.random.randint(keys[2], (1, TIMED_TOKENS), 0, VOCAB)
    programs = {loss.__name__: compiled(loss, TIMED_TOKENS) for loss in (ours, naive)}
    fastest = dict.fromkeys(programs, math.inf)
    for turn in range(rounds + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(hidden, table, targets))
            if turn:
                fastest[name] = min(fastest[name], time.perf_counter() - began)
    return fastest


def main() -> None:
    """Measures, and writes the section and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    memory = {loss.__name__: compiled(loss, TOKENS).memory_analysis().temp_size_in_bytes for loss in (ours, naive)}
    figures = {"bytes": memory, "seconds": seconds(rounds)}
    page = MARK + TEXT.format(vocab=VOCAB, dim=DIM, chunk=CHUNK, tokens=TOKENS, timed=TIMED_TOKENS)
    rows = {f"{TOKENS:,} tokens, MiB": ("bytes", 2**-20), f"{TIMED_TOKENS:,} tokens, ms": ("seconds", 1000)}
    for label, (key, scale) in rows.items():
        mine, plain = (figures[key][name] * scale for name in ("ours", "naive"))
        page += f"| {label} | {mine:,.0f} | {plain:,.0f} | {mine / plain:.3f} |\n"
    print(page)
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    before, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(before + page)


if __name__ == "__main__":
    main()
