"""What positions spread over `context` exchange, and how even their work is, as in docs/attention.md.

  python benchmarks/context.py

Nothing is run: the training step is compiled for 2, 4 and 8 devices that are simulated on the CPU, and what its
collectives send is counted, layer by layer, beside what must be sent on paper.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import Gemma4Config
from gemma4_jax.configs import base
from gemma4_jax.model import image_tokens
from gemma4_jax.ops.attention import interval
from gemma4_jax.ops.attention.context import swap_halves
from gemma4_jax.run_config import RunConfig
from gemma4_jax.sharding import make_mesh
from gemma4_jax.sizes import SIZES
from gemma4_jax.train.program import compile_step, make_program

LENGTH = 16_384
SHARDS = (2, 4, 8)
PAGE = Path(__file__).parents[1] / "docs" / "attention.md"
MARK = "## Over context\n"

TEXT = (
    MARK
    + """
Written by `benchmarks/context.py` from the compiled training step of a row of {length:,} tokens, remat full, in which
`context` spreads the positions. MiB that a device gets from the others in each layer, in the type of activations
(float32 here, half of it in bfloat16), forward and backward, beside what it must get: of a global layer the keys and
values of the row, or where both are made of one, that; of a sliding layer those around its two chunks. In the backward
pass they are got again, for nothing of them is kept, and their gradients go back. The layers of E2B that share keys and
values get them once for all. Layers have the attention of the official sizes and are else narrow: a width adds nothing.

| layer | shards | forward | on paper | backward | on paper | ratio |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""
)

BALANCE = """
Beside this, once a step: the second half of the final hidden states, and of their gradients, and whole numbers about
the tokens. With one stretch of the row to each shard sliding layers would get half as much, and the work of global
layers would not be even: blocks of {queries} x {keys} that the busiest shard visits, over the mean. Two chunks are
even for one long document; for several of unequal lengths no order that does not know them is.

| row | shards | one stretch a shard | two chunks |
| --- | ---: | ---: | ---: |
"""

COLLECTIVE = re.compile(
    r" = (?P<shapes>\(?[a-z].*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\((?P<rest>.*)"
)


def narrow(name: str) -> Gemma4Config:
    """The attention of an official size in two periods of layers of each stack, and little else: one is no loop."""
    config = SIZES[name]()
    text, vision = config.text, config.vision
    assert vision is not None
    num_own = 2 * text.attention_period
    num_shared = num_own if text.num_kv_shared_layers else 0
    text = dataclasses.replace(
        text,
        num_layers=num_own + num_shared,
        num_kv_shared_layers=num_shared,
        embed_dim=64,
        mlp_dim=64,
    )
    vision = dataclasses.replace(vision, num_layers=1, embed_dim=64, mlp_dim=64, num_heads=1, head_dim=64)
    return dataclasses.replace(config, text=text, vision=vision, audio=None)


def compiled(name: str, shards: int) -> tuple[RunConfig, str]:
    """The run, and its training step as the compiler has it."""
    run = base.get_config("tiny")
    run.data.seq_len, run.data.batch_size, run.train.loss_chunk, run.train.remat = LENGTH, 1, 1024, "full"
    run.data.images_per_row = 4 if SIZES[name]().text.image_blocks_bidirectional else 0
    config = dataclasses.replace(RunConfig.from_dict(run.to_dict()), model=narrow(name))
    program = make_program(config, make_mesh({"context": shards}, jax.devices()[:shards]))
    return program.config, compile_step(program, 1).as_text()


def received(line: re.Match[str], shards: int) -> float:
    """Bytes that a device gets in a collective, on average."""
    size = 0
    for dtype, dims in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", line["shapes"]):
        size += int(np.prod([int(dim) for dim in dims.split(",") if dim])) * int(re.sub(r"\D", "", dtype)) // 8
    if line["kind"] == "collective-permute":
        pairs = re.findall(
            r"\{(\d+),(\d+)\}", line["rest"].partition("source_target_pairs=")[2].partition("}}")[0] + "}"
        )
        return size * sum(source != target for source, target in pairs) / shards
    share = {"all-reduce": 2 / shards, "reduce-scatter": 1}.get(line["kind"], 1 / shards)
    return size * share * (shards - 1)


def exchanged(program: str, shards: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Kind of layer -> pass -> bytes; and what else attention sends, beside gradients of its weights."""
    found: dict[str, Counter[str]] = {}
    others = []
    for line in program.splitlines():
        match = COLLECTIVE.search(line)
        name = re.search(r'op_name="([^"]*)"', line)
        if match is None or name is None:
            continue
        scope = re.search(r"(sliding|global)_attention", name[1])
        if "exchange" in name[1] and scope is not None:
            kind = scope[1] if "while/body" in name[1] else f"{scope[1]}, shared"
            which = "backward" if "transpose" in name[1] or "rematted" in name[1] else "forward"
            found.setdefault(kind, Counter())[which] += received(match, shards)
        elif scope is not None and "dot_general" not in name[1]:
            others.append(line.strip()[:300])
    return found, others


def on_paper(config: RunConfig, kind: str, shards: int) -> float:
    """Bytes of keys and values that a device must get from others for a layer, on average, in float32."""
    text = config.model.text
    chunk = LENGTH // (2 * shards)
    if kind.startswith("global"):
        numbers = text.num_global_kv_heads * text.global_head_dim * (1 if text.uses_k_eq_v else 2)
        return 4 * numbers * (LENGTH - 2 * chunk)
    images = image_tokens(config.model, config.data.images_per_row * config.data.soft_tokens_per_image * 9)
    ahead = max(images - 1, 0) if text.image_blocks_bidirectional else 0
    place, count = np.arange(LENGTH), 0
    for shard in range(shards):
        chunks = 2 * shard, 2 * (shards - 1 - shard) + 1
        near = [(place >= j * chunk - text.sliding_window + 1) & (place < (j + 1) * chunk + ahead) for j in chunks]
        count += np.sum((near[0] | near[1]) & ~np.isin(place // chunk, chunks))
    return 4 * 2 * text.num_kv_heads * text.head_dim * count / shards


def imbalance(documents: Sequence[int], shards: int, blocks: interval.Blocks) -> tuple[float, float]:
    """Blocks that the busiest shard visits over the mean, with one stretch of the row to each and with two chunks."""
    start = np.repeat(np.cumsum([0, *documents[:-1]]), documents)
    first = start.reshape(-1, blocks.queries)[:, 0] // blocks.keys
    visited = -(-np.arange(1, LENGTH + 1).reshape(-1, blocks.queries)[:, -1] // blocks.keys) - first
    of_query = jnp.repeat(jnp.asarray(visited), blocks.queries)[None]
    with jax.set_mesh(make_mesh({"context": shards}, jax.devices()[:shards])):
        orders = of_query, jax.jit(swap_halves)(of_query)
    works = [np.asarray(order)[0].reshape(shards, -1).sum(1) for order in orders]
    return works[0].max() / works[0].mean(), works[1].max() / works[1].mean()


def balance() -> str:
    """The second table of the page."""
    blocks = interval.block_sizes(LENGTH, LENGTH, 8, None)
    table = BALANCE.format(queries=blocks.queries, keys=blocks.keys)
    rows = {
        "one document": [LENGTH],
        "documents of 12,288 and 4,096": [12_288, 4096],
        "8 documents of 2,048": [2048] * 8,
    }
    for name, documents in rows.items():
        for shards in SHARDS:
            before, after = imbalance(documents, shards, blocks)
            table += f"| {name} | {shards} | {before:.2f} | {after:.2f} |\n"
    return table


def main() -> None:
    """Compiles, counts, and writes the section of the page and its figures."""
    page, figures = TEXT.format(length=LENGTH), []
    for name in ("e2b", "31b"):
        for shards in SHARDS:
            config, program = compiled(name, shards)
            found, others = exchanged(program, shards)
            assert not others, others
            for kind, passes in sorted(found.items()):
                layers = config.model.text.attention_period - 1 if kind == "sliding" else 1
                must = on_paper(config, kind, shards)
                # What is shared is got once, and kept for the backward pass.
                musts = [must, must if "shared" in kind else 2 * must]
                got = [passes[which] / layers for which in ("forward", "backward")]
                figures.append({"layer": f"{name}, {kind}", "shards": shards, "bytes": got, "on paper": musts})
                cells = [f"{value / 2**20:.2f}" for pair in zip(got, musts, strict=True) for value in pair]
                row = [f"{name}, {kind}", str(shards), *cells, f"{sum(got) / sum(musts):.2f}"]
                page += f"| {' | '.join(row)} |\n"
                print(page.splitlines()[-1], flush=True)
    page += balance()
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    before, _, section = PAGE.read_text().partition(MARK)
    _, mark, behind = section.partition("\n## ")
    PAGE.write_text(before.rstrip() + "\n\n" + page + mark + behind)
    print(page)


if __name__ == "__main__":
    main()
