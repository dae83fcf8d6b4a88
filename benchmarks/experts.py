"""What the experts of a MoE layer cost as their number grows, forward and backward, as docs/experts.md.

  python benchmarks/experts.py [--rounds=5] [--tokens=16384]   times on this machine
  python benchmarks/experts.py --compile=v5p:2x2x1             work of the programs for a TPU, which need not be there

Programs take turns; quoted are the median and the least of each, and the median of the ratios of single turns, which is
what others who use the machine disturb least.
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
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gemma4_jax.ops.expert_blocks import activate
from gemma4_jax.ops.expert_parallel import apply_experts
from gemma4_jax.ops.grouped import TILE_ROWS

PAGE = Path(__file__).parents[1] / "docs" / "experts.md"
FIGURES = Path(__file__).with_suffix(".json")

CHOSEN, EMBED_DIM, EXPERT_DIM = 8, 512, 128
EXPERTS = (8, 128)
DENSE_TOKENS = 512
"""Tokens for `dense`, whose time grows as tokens times experts: its time is quoted for each token."""

TEXT = """# What experts cost

Written by `benchmarks/experts.py`. One layer, forward and backward to tokens, weights of the choice and matrices;
choices are random, C = {chosen}.

## On {device}

Time for each token in microseconds, the median of {rounds} turns and in brackets the least: {tokens:,} tokens, D {dim},
F {expert_dim}. `blocks` is what "auto" chooses on CPU and GPU. The dense MLP is as wide as the chosen experts together,
{width:,}. `dense`, every expert on every token, has {dense_tokens:,} tokens.

| | float32 | bfloat16 |
| --- | ---: | ---: |
{times}

Ratios, each the median of those of single turns:

{ratios}

## On TPU, compiled

Operations of the program for one chip of {topology}, over those of the products that are asked for, at the sizes of
26B-A4B (D 2816, F 704, bfloat16); what a kernel of JAX's megablox does is its own estimate, which counts each row once.
A tile of {tile} rows that two experts share is computed for both; the last column counts that, for random choices.

| | experts on the chip | tokens | operations / ideal | with shared tiles |
| --- | ---: | ---: | ---: | ---: |
{compiled}
"""


def loss_gradient(function: Callable[..., jax.Array], inputs: tuple[jax.Array, ...]) -> Callable[..., Any]:
    """The function's gradient for what is not an index, compiled, in a direction of its own."""
    direction = jax.random.normal(jax.random.key(9), inputs[0].shape)
    where = tuple(i for i, value in enumerate(inputs) if jnp.issubdtype(value.dtype, jnp.floating))
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32) * direction), argnums=where))


def make_layer(num_experts: int, num_tokens: int, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """x, choices, weights, gate_up and down."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (1, num_tokens, EMBED_DIM), (num_experts, EMBED_DIM, 2, EXPERT_DIM), (num_experts, EXPERT_DIM, EMBED_DIM)
    x, gate_up, down = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))
    _, choices = jax.lax.top_k(jax.random.normal(keys[3], (1, num_tokens, num_experts)), CHOSEN)
    return x, choices, jax.random.uniform(keys[4], choices.shape), gate_up * EMBED_DIM**-0.5, down * EXPERT_DIM**-0.5


def dense_mlp(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """What the experts are compared with: x [B, T, D], gate_up [D, 2 F], down [F, D]."""
    return activate(x @ gate_up) @ down


def measure(num_tokens: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Program -> dtype -> microseconds for each token, in turns."""
    programs: dict[tuple[str, str], tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        name = jnp.dtype(dtype).name
        for implementation, tokens in (("blocks", num_tokens), ("dense", DENSE_TOKENS)):
            for num_experts in EXPERTS:
                inputs = make_layer(num_experts, tokens, dtype)

                def experts(*inputs: jax.Array, implementation: str = implementation) -> jax.Array:
                    return apply_experts(*inputs, implementation=implementation)

                programs[f"{implementation}, {num_experts} experts", name] = loss_gradient(experts, inputs), inputs
        x, _, _, gate_up, down = make_layer(CHOSEN, num_tokens, dtype)
        gate_up = jnp.moveaxis(gate_up, 0, 2).reshape(EMBED_DIM, -1)
        inputs = x, gate_up, down.reshape(-1, EMBED_DIM) * CHOSEN**-0.5
        programs["dense MLP", name] = loss_gradient(dense_mlp, inputs), inputs
    found: dict[str, dict[str, list[float]]] = {program: {} for program, _ in programs}
    for turn in range(rounds + 1):
        for (program, dtype), (function, inputs) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            if turn:
                seconds = time.perf_counter() - began
                found[program].setdefault(dtype, []).append(1e6 * seconds / inputs[0].shape[1])
    return found


def compile_for(topology: str) -> list[dict[str, Any]]:
    """Operations over the ideal of the layer of 26B-A4B, for one chip of a TPU."""
    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
    d, f = 2816, 704
    rows = []
    for implementation, e, m in (("megablox", 128, 16384), ("megablox", 16, 8192), ("ragged", 16, 8192)):

        def experts(
            x: jax.Array, choices: jax.Array, *rest: jax.Array, implementation: str = implementation
        ) -> tuple[Any, ...]:
            layer = lambda x, *rest: apply_experts(x, choices, *rest, implementation=implementation)  # noqa: E731
            out, pull = jax.vjp(layer, x, *rest)
            return out, pull(x)

        shapes = ((1, m, d), "bfloat16"), ((1, m, CHOSEN), "int32"), ((1, m, CHOSEN), "float32")
        shapes += ((e, d, 2, f), "bfloat16"), ((e, f, d), "bfloat16")
        inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=chip) for shape, dtype in shapes]
        done = jax.jit(experts).lower(*inputs).compile().cost_analysis()["flops"]
        ratio = done / (3 * 2 * m * CHOSEN * d * 3 * f)
        sizes = np.bincount(np.random.default_rng(0).integers(e, size=m * CHOSEN), minlength=e)
        ends = np.cumsum(sizes)
        tiles = np.sum(-(-ends // TILE_ROWS) - (ends - sizes) // TILE_ROWS)
        shared = float(tiles * TILE_ROWS / (m * CHOSEN)) if implementation == "megablox" else 1
        row = {
            "implementation": implementation,
            "experts": e,
            "tokens": m,
            "ratio": ratio,
            "with_tiles": ratio * shared,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def write_page(figures: dict[str, Any]) -> None:
    """docs/experts.md, of what has been measured and compiled."""

    def middle(program: str, dtype: str) -> float:
        return statistics.median(figures["microseconds"][program][dtype])

    def least(program: str, dtype: str) -> float:
        return min(figures["microseconds"][program][dtype])

    dtypes = ("float32", "bfloat16")
    times, ratios = [], []
    for program in figures["microseconds"]:
        cells = (f"{middle(program, dtype):,.1f} ({least(program, dtype):,.1f})" for dtype in dtypes)
        times.append(f"| {program} | {' | '.join(cells)} |")
    for text, over, under in (
        ("128 experts over 8", "blocks, 128 experts", "blocks, 8 experts"),
        ("8 experts over the dense MLP", "blocks, 8 experts", "dense MLP"),
        ("128 experts over the dense MLP", "blocks, 128 experts", "dense MLP"),
        ("`dense` over `blocks`, 128 experts", "dense, 128 experts", "blocks, 128 experts"),
    ):
        each = []
        for dtype in dtypes:
            turns = (figures["microseconds"][program][dtype] for program in (over, under))
            ratio = statistics.median(a / b for a, b in zip(*turns, strict=True))
            each.append(f"{ratio:.2f} in {dtype}")
        ratios.append(f"- {text}: {', '.join(each)}")
    compiled = [
        f"| {row['implementation']} | {row['experts']} | {row['tokens']:,} | {row['ratio']:.2f} "
        f"| {row['with_tiles']:.2f} |"
        for row in figures.get("compiled", ())
    ]
    PAGE.write_text(
        TEXT.format(
            chosen=CHOSEN,
            device=figures["device"],
            rounds=figures["rounds"],
            tokens=figures["tokens"],
            dim=EMBED_DIM,
            expert_dim=EXPERT_DIM,
            width=CHOSEN * EXPERT_DIM,
            dense_tokens=DENSE_TOKENS,
            times="\n".join(times),
            ratios="\n".join(ratios),
            topology=figures.get("topology", ""),
            tile=TILE_ROWS,
            compiled="\n".join(compiled),
        )
    )


def main() -> None:
    """Measures or compiles, and writes the page and its figures; those of the other are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--compile", metavar="TOPOLOGY")
    given = parser.parse_args()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if given.compile:
        figures |= {"topology": given.compile, "compiled": compile_for(given.compile)}
    else:
        figures |= {"device": jax.devices()[0].device_kind, "rounds": given.rounds, "tokens": given.tokens}
        figures["microseconds"] = measure(given.tokens, given.rounds)
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    if "microseconds" in figures:
        write_page(figures)


if __name__ == "__main__":
    main()
