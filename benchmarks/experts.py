"""What the experts of a MoE layer cost as their number grows, forward and backward, as docs/experts.md.

  python benchmarks/experts.py [--rounds=5]           a layer on this machine
  python benchmarks/experts.py --step [--rounds=5]    a training step beside transformers, of the `reference` extra, and
                                                      the same again on one core: taskset -c 0 python ...
  python benchmarks/experts.py --compile              a layer for a TPU, which need not be there: operations
  python benchmarks/experts.py --exchange=gather      a layer for eight TPUs: memory; and the same of ragged

Each writes its part of the page, which has the figures of benchmarks/moe_curves.py too. Programs take turns; quoted are
the median and the least of each, and the median of the ratios of single turns, which is what others who use the machine
disturb least.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import moe_curves
import numpy as np
import step
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from gemma4_jax.ops.expert_blocks import activate
from gemma4_jax.ops.expert_exchange import EXCHANGES
from gemma4_jax.ops.expert_parallel import PIECE, apply_experts
from gemma4_jax.ops.grouped import BLOCKS as BLOCK_ROWS
from gemma4_jax.ops.grouped import TILE_ROWS
from gemma4_jax.sharding import BATCH_AXES, make_mesh

PAGE = Path(__file__).parents[1] / "docs" / "experts.md"
FIGURES = Path(__file__).with_suffix(".json")

CHOSEN, EMBED_DIM, EXPERT_DIM = 8, 512, 128
EXPERTS = (8, 128)
TOKENS = (16384, 4096)
TOPOLOGY = "v5p:2x2x1"
TEXT = """# What experts cost

Written by `benchmarks/experts.py`. A layer is one forward and backward pass to tokens, weights of the choice and
matrices; choices are random, C = {chosen}.

## A layer on {device}, an {processor}

CPU time for each token in microseconds, of all cores together, the median of {rounds} turns and in brackets the least:
D {dim}, F {expert_dim}. `blocks` is what "auto" chooses on CPU and GPU. The dense MLP is as wide as the chosen experts
together, {width:,}.

{times}

Ratios, each the median of those of single turns:

{ratios}

On an AMD EPYC, from left to right: 128 experts over 8, 1.14, 1.08, 1.35 and 1.33; and over the dense MLP, 1.18, 1.03,
1.67 and 1.69.

What grows with the number of experts is the reading of their matrices and the writing of their gradients, which fewer
tokens share, into memory that is new to the process; and the rows that only fill an expert's last block, 16 of {block}
on average, with the smaller blocks that loads of uneven size need.

## A training step beside transformers

{step}

## A layer on TPU, compiled

Operations of the program for one chip of {topology}, over those of the products that are asked for, at the sizes of
26B-A4B (D 2816, F 704, bfloat16); what a kernel of JAX's megablox does is its own estimate, which counts each row once.
A tile of {tile} rows that two experts share is computed for both; the last column counts that, for random choices.

| | experts on the chip | tokens | operations / ideal | with shared tiles |
| --- | ---: | ---: | ---: | ---: |
{compiled}

## On GPU

No GPU has run any of this; `benchmarks/experts_gpu.py` is ready for one, and compares with a plain matmul and with
torch's `grouped_mm`. "auto" takes `blocks`. `train.experts=mosaic_gpu` names tokamax's kernels (`pip install
".[mosaic_gpu]"`), in bfloat16 and on Hopper; on Blackwell they have no gradient of the matrices. A layer of 26B-A4B
lowers for Hopper, forward and backward, with 128 experts or 16, as these kernels and no other product; run in Pallas'
interpreter they are right, empty experts included (`tests/ops/test_grouped_mosaic_gpu.py`, where tokamax is
installed). tokamax 0.0.12 leaves out what an inner axis has behind its last step, which with the steps of 128 that it
takes by itself is an eleventh of 704; we fill axes up to steps of 64. It multiplies rows of neighbouring experts by
zero, and what is no number would spread to the gradients of their matrices; here it stays with its expert. What
neither check can tell is whether a step's matmul is done before the next step is read into its place, for which the
product of rows does not wait. So the benchmark also compares with `blocks`, at full size.

## Experts spread over devices

`train.expert_exchange` names how tokens travel to the devices that hold their experts. Neither drops any, whatever the
load, and padding is of no expert.

- `gather`, which "auto" takes everywhere: all tokens of the n devices of the axis to all of them, by an all-gather, and
  the sums back by a reduce-scatter. Each token goes to n - 1 devices.
- `ragged`: each token to the devices of its experts alone, once to each, and the sums back, by `ragged_all_to_all`,
  which XLA has for TPU and GPU and not for CPU. Of even choices a token goes to (n - 1) (1 - (1 - 1/n)^C) devices.

| devices, C = {chosen} | {devices} |
| --- | {columns} |
| `gather`, times a token is sent | {gathered} |
| `ragged`, times a token is sent | {ragged} |
| `gather`, per link and direction of a ring | {gathered_link} |
| `ragged`, per link and direction of a ring | {ragged_link} |

On a ring a gather passes each token on from device to device, once over every link, and what goes to one device alone
crosses all links on its way there, n^2 / 8 of them times the share of tokens. So the fewer bytes of `ragged` are the
faster exchange only where every device reaches every other directly (NVLink), or where the axis lies over several axes
of the network. It has been compiled, and its sums are tested with its collective emulated; it has not been run.

Of the experts of a device, `fsdp` leaves it a part. A layer's are gathered when it is their turn, in the type of
activations, and their gradients are scattered in it, as those of dense weights are. What experts of other devices made
of the tokens is kept for the backward pass, [B, T, D] a layer, under every remat but "offload": it would travel again.
docs/compiled.md has the bytes of whole steps beside the least on paper.

What a device holds, with M tokens on each of n devices: the n M tokens that reach it, or have room to, with their C
choices and weights, and the order of those n M C choices. Of the choices that are its own, 1 / n on average, it works
on {piece:g} times that mean at once, [{piece:g} M C, D] and [{piece:g} M C, 2 F]: as a rule that is all of them. Where
more are its own it goes on with the next as many, and computes what their backward pass needs again; so the worst case
costs time and not memory. (`blocks` keeps its product with gate and up for all n M C.) The layer of 26B-A4B for the
eight chips of v5p:2x2x2, expert = 8, 4,096 tokens on each, forward and backward, takes in temporary memory
{exchange}; it was 12,571 MiB when the rows of all choices were held. There the
compiler makes an all-reduce of the reduce-scatter, twice its bytes, as it does for an axis that is all of a slice, and
does not for one that is a part.

## Balance

The balance loss is E times the sum over experts of their share of choices times their mean probability, both over all
tokens of a microbatch, on all devices; padding does not count. It is not over all microbatches: the share of choices
is not differentiated, but is needed before the first microbatch is, and known only when the last has been through all
layers. That is a forward pass more, a third of the step. What is left out is the covariance of the two over
microbatches, and it is small: for 2 of 16 experts, 8 microbatches and tokens without order, the gradient of a router's
kernel differs from that of the whole batch by 0.1% of its norm where a microbatch has 8,192 tokens, as in
`pretrain_small`, by 0.8% at 1,024, and by 7% at 128.
{curves}"""

STEP_TEXT = """The model of docs/step.md with {num_experts} experts of width {expert_dim} in each layer, of which
{num_experts_per_token} are chosen for each token, on {rows} rows of {length} tokens. Theirs is `Gemma4ForCausalLM` of
transformers {transformers} with torch {torch}, whose experts are torch's `grouped_mm`. Quoted is the fastest run.

| | ours | theirs | ratio |
| --- | ---: | ---: | ---: |
| two cores, tokens a second | {of_two[ours]:,.0f} | {of_two[theirs]:,.0f} | {of_two[ratio]:.2f} |
| one core, CPU time a step, s | {of_one[our_cpu]:.2f} | {of_one[their_cpu]:.2f} | {of_one[cpu_ratio]:.2f} |
| peak memory, MiB | {of_two[our_peak]:,.0f} | {of_two[their_peak]:,.0f} | {of_two[peak_ratio]:.2f} |

With large pages, as `make` sets them (README.md), here and above; without, the first two ratios were 1.27 and 1.26. On
an AMD EPYC they were 1.90, 1.82 and 0.70. Most of a step is what one without experts takes."""


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


BLOCKS = functools.partial(apply_experts, implementation="blocks")


def dense_mlp(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """What the experts are compared with: x [B, T, D], gate_up [D, 2 F], down [F, D]."""
    return activate(x @ gate_up) @ down


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Program -> tokens and dtype -> microseconds of CPU time for each token, in turns."""
    programs: dict[tuple[str, str], tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {}
    for num_tokens, dtype in itertools.product(TOKENS, (jnp.float32, jnp.bfloat16)):
        case = f"{num_tokens:,} tokens, {jnp.dtype(dtype).name}"
        for num_experts in EXPERTS:
            inputs = make_layer(num_experts, num_tokens, dtype)
            programs[f"blocks, {num_experts} experts", case] = loss_gradient(BLOCKS, inputs), inputs
        x, _, _, gate_up, down = make_layer(CHOSEN, num_tokens, dtype)
        gate_up = jnp.moveaxis(gate_up, 0, 2).reshape(EMBED_DIM, -1)
        inputs = x, gate_up, down.reshape(-1, EMBED_DIM) * CHOSEN**-0.5
        programs["dense MLP", case] = loss_gradient(dense_mlp, inputs), inputs
    found: dict[str, dict[str, list[float]]] = {program: {} for program, _ in programs}
    for turn in range(rounds + 1):
        for (program, case), (function, inputs) in programs.items():
            began = time.process_time()
            jax.block_until_ready(function(*inputs))
            if turn:
                seconds = time.process_time() - began
                found[program].setdefault(case, []).append(1e6 * seconds / inputs[0].shape[1])
    return found


def measure_step(rounds: int) -> dict[str, Any]:
    """The figures of a training step and of what it is beside."""
    sizes = {"rows": 4, "length": 512}
    found = step.measure(*sizes.values(), rounds, has_experts=True)
    ours, theirs = found["ours"], found["theirs"]
    return sizes | step.EXPERTS | {
        "runs": rounds,
        "transformers": version("transformers"),
        "torch": version("torch"),
        "ours": ours["tokens_per_second"],
        "theirs": theirs["tokens_per_second"],
        "ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "our_cpu": ours["cpu_seconds"],
        "their_cpu": theirs["cpu_seconds"],
        "cpu_ratio": theirs["cpu_seconds"] / ours["cpu_seconds"],
        "our_peak": ours["peak"],
        "their_peak": theirs["peak"],
        "peak_ratio": ours["peak"] / theirs["peak"],
    }  # fmt: skip


def compile_exchange(exchange: str) -> float:
    """MiB of temporary memory of the layer of 26B-A4B over eight chips, forward and backward."""
    e, d, f, rows, length = 128, 2816, 704, 8, 4096
    mesh = make_mesh({"expert": 8}, topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices)

    def experts(x: jax.Array, choices: jax.Array, *rest: jax.Array) -> tuple[Any, ...]:
        way = {"implementation": "megablox", "exchange": exchange}
        out, pull = jax.vjp(lambda x, *rest: apply_experts(x, choices, *rest, **way), x, *rest)
        return out, pull(x)

    tokens, matrices = NamedSharding(mesh, P(BATCH_AXES)), NamedSharding(mesh, P("expert"))
    shapes = ((rows, length, d), "bfloat16", tokens), ((rows, length, CHOSEN), "int32", tokens)
    shapes += (((rows, length, CHOSEN), "float32", tokens), ((e, d, 2, f), "bfloat16", matrices))
    shapes += (((e, f, d), "bfloat16", matrices),)
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(experts).lower(*inputs).compile().memory_analysis().temp_size_in_bytes / 2**20


def compile_layer() -> list[dict[str, Any]]:
    """Operations over the ideal of the layer of 26B-A4B, for one chip of a TPU."""
    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0])
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


def layer_tables(microseconds: dict[str, dict[str, list[float]]]) -> dict[str, str]:
    """The table of times and the list of ratios."""
    cases = list(next(iter(microseconds.values())))
    times = [f"| | {' | '.join(cases)} |", f"| --- |{' ---: |' * len(cases)}"]
    for program, of_case in microseconds.items():
        cells = (f"{statistics.median(of_case[case]):,.1f} ({min(of_case[case]):,.1f})" for case in cases)
        times.append(f"| {program} | {' | '.join(cells)} |")
    few, many = (f"blocks, {num_experts} experts" for num_experts in EXPERTS)
    ratios = [f"| | {' | '.join(cases)} |", f"| --- |{' ---: |' * len(cases)}"]
    for over, under in ((many, few), (few, "dense MLP"), (many, "dense MLP")):
        cells = []
        for case in cases:
            turns = zip(microseconds[over][case], microseconds[under][case], strict=True)
            cells.append(f"{statistics.median(a / b for a, b in turns):.2f}")
        ratios.append(f"| {over}, over {under} | {' | '.join(cells)} |")
    return {"times": "\n".join(times), "ratios": "\n".join(ratios)}


def exchange_table() -> dict[str, str]:
    """How often a token is sent, of even choices, and how many cross a link of a ring in one direction."""
    sizes = (2, 4, 8, 16, 32)
    share = [1 - (1 - 1 / n) ** CHOSEN for n in sizes]
    rows: dict[str, list[float]] = {
        "gathered": [n - 1 for n in sizes],
        "ragged": [(n - 1) * part for n, part in zip(sizes, share, strict=True)],
        "gathered_link": [(n - 1) / 2 for n in sizes],
        "ragged_link": [n**2 / 8 * part for n, part in zip(sizes, share, strict=True)],
    }
    table = {name: " | ".join(f"{value:.2g}" for value in row) for name, row in rows.items()}
    return table | {"devices": " | ".join(map(str, sizes)), "columns": " | ".join(["---:"] * len(sizes))}


def write_page(figures: dict[str, Any]) -> None:
    """docs/experts.md, of what has been measured and compiled."""
    compiled = [
        f"| {row['implementation']} | {row['experts']} | {row['tokens']:,} | {row['ratio']:.2f} "
        f"| {row['with_tiles']:.2f} |"
        for row in figures["compiled"]
    ]
    exchange = (f"{mebibytes:,.0f} MiB with `{name}`" for name, mebibytes in figures["exchange"].items())
    page = TEXT.format(
        **layer_tables(figures["microseconds"]),
        **exchange_table(),
        chosen=CHOSEN,
        device=figures["device"],
        processor=step.processor(),
        rounds=figures["rounds"],
        dim=EMBED_DIM,
        expert_dim=EXPERT_DIM,
        width=CHOSEN * EXPERT_DIM,
        block=BLOCK_ROWS[-1],
        step=STEP_TEXT.format(**figures["step"]["1"], of_one=figures["step"]["1"], of_two=figures["step"]["2"]),
        topology=TOPOLOGY,
        tile=TILE_ROWS,
        compiled="\n".join(compiled),
        piece=PIECE,
        exchange=" and ".join(exchange),
        curves=moe_curves.section(),
    )
    PAGE.write_text(page)


def main() -> None:
    """Measures or compiles, and writes the page and its figures; those of the others are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--exchange", choices=EXCHANGES)
    parser.add_argument("--page", action="store_true", help="write the page again, of the figures that there are")
    given = parser.parse_args()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if given.compile:
        figures["compiled"] = compile_layer()
    elif given.exchange:
        figures.setdefault("exchange", {})[given.exchange] = compile_exchange(given.exchange)
    elif given.step:
        figures.setdefault("step", {})[str(len(os.sched_getaffinity(0)))] = measure_step(given.rounds)
    elif not given.page:
        figures |= {"device": jax.devices()[0].device_kind, "rounds": given.rounds}
        figures["microseconds"] = measure(given.rounds)
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    missing = {"microseconds", "step", "compiled", "exchange"} - figures.keys()
    print(f"the page waits for {', '.join(sorted(missing))}" if missing else f"wrote {PAGE}")
    if not missing:
        write_page(figures)


if __name__ == "__main__":
    main()
