"""A training step on CPU beside transformers and torch: docs/step.md.

  python benchmarks/step.py [--rounds=5]     # needs the `reference` extra

Each of the two is a process of its own, so that its peak memory is its own. They take turns at short runs of steps, and
the fastest run of each is quoted: what else the machine does can only slow a run down.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "step.md"
SIZES = {
    "vocab_size": 32768, "embed_dim": 256, "mlp_dim": 1024, "num_layers": 6, "attention_period": 6, "num_heads": 4,
    "num_kv_heads": 2, "num_global_kv_heads": 2, "head_dim": 64, "global_head_dim": 64, "sliding_window": 512,
}  # fmt: skip
EXPERTS = {"num_experts": 32, "num_experts_per_token": 4, "expert_dim": 128}
"""What a model of docs/experts.md has beside them."""
CASES = {"8 x 512": (8, 512), "1 x 4,096": (1, 4096)}
"""Rows and tokens of a row of a batch."""
STEPS = 3
"""Steps of a run."""
CHUNK = 1024
"""Tokens whose logits exist at one time."""

DEPTHS = SIZES["num_layers"], 10 * SIZES["num_layers"]
"""Layers of models whose compilation is compared."""

TEXT = """# What a training step costs

Written by `benchmarks/step.py` with jax {jax} beside transformers {transformers} and torch {torch}, on {cores} cores
of an {processor}. A Gemma 4 of text alone: 6 layers (five sliding with a window of 512, one global), width 256, MLP
1,024, 4 heads of 64, 2 of keys and values, vocabulary 32,768, no per-layer embeddings. Both train it in float32 on the
same tokens, one document a row, with loss on all of them, gradients cut to norm 1, and AdamW: ours is the step of
`gemma4 train`, with the logits of {chunk:,} tokens at a time, theirs `Gemma4ForCausalLM` with sdpa and fused AdamW.
Memory is the largest that the process had resident, libraries included.

| rows x tokens | ours, tokens/s | theirs, tokens/s | ratio | ours, peak MiB | theirs, peak MiB | ratio |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""

COMPILE_TEXT = """
Both had large pages, as `make` sets them (README.md); without, the ratios were 1.51 and 1.68. On two cores of an AMD
EPYC they were 1.60 and 1.93.

Layers are scanned by period, so a deeper model is no longer program: to trace and compile the step of 1 x 4,096 takes
{short:.0f} processor seconds with {few} layers and {long:.0f} with {many}, {ratio:.2f} times as many.
"""


def processor() -> str:
    """The name of this machine's, without the marks of its maker."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return re.sub(r"\(\w+\)", "", named[1]) if named else platform.processor()


def tokens_of(rows: int, length: int) -> np.ndarray:
    """[rows, length + 1] int64 random ids that stand for no role."""
    return np.random.default_rng(0).integers(16, SIZES["vocab_size"], (rows, length + 1))


def model_config(has_experts: bool = False, num_layers: int = SIZES["num_layers"]) -> Any:
    """The architecture that both train, or a deeper one."""
    from gemma4_jax.config import Gemma4Config, SpecialTokens, TextConfig

    roles = ("begin_image", "image", "end_image", "begin_audio", "audio", "end_audio", "video")
    text = TextConfig(**SIZES | {"num_layers": num_layers}, **(EXPERTS if has_experts else {}))
    return Gemma4Config(text, tokens=SpecialTokens(**{name: 3 + i for i, name in enumerate(roles)}))


def program_of(rows: int, length: int, model: Any) -> Any:
    """What this package compiles for a model."""
    import jax

    from gemma4_jax.configs import base
    from gemma4_jax.run_config import RunConfig
    from gemma4_jax.sharding import make_mesh
    from gemma4_jax.train.program import make_program

    config = base.get_config()
    config.data.seq_len, config.data.batch_size, config.data.images_per_row = length, rows, 0
    config.train.loss_chunk = CHUNK // rows
    run = dataclasses.replace(RunConfig.from_dict(config.to_dict()), model=model)
    return make_program(run, make_mesh({}, jax.devices()[:1]))


def ours(rows: int, length: int, has_experts: bool) -> Callable[[], float]:
    """A step of this package that returns its loss."""
    import jax

    from gemma4_jax.batch import FIELDS, Batch
    from gemma4_jax.train.state import create_state

    program, tokens = program_of(rows, length, model_config(has_experts)), tokens_of(rows, length)
    mesh = program.mesh
    sizes = {**program.row.sizes(), "batch": rows, "xy": 2}
    arrays = {
        name: np.full([sizes[dim] for dim in field.dims], field.padding, field.dtype) for name, field in FIELDS.items()
    }
    arrays |= {"tokens": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
    arrays["loss_weights"][:] = arrays["segment_ids"][:] = 1
    arrays["positions"][:] = np.arange(length)
    with jax.set_mesh(mesh):
        batch = jax.device_put(Batch(**arrays))
        state = create_state(program.state, program.config)

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program.train_step(state, batch)
        return float(metrics.means["loss"])

    return step


def theirs(rows: int, length: int, has_experts: bool) -> Callable[[], float]:
    """A step of transformers that returns its loss."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    from gemma4_jax.hf.config import to_hf

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    content = to_hf(model_config(has_experts), dtype="float32", max_soft_tokens=280, is_text_only=True)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**content, attn_implementation="sdpa")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.from_numpy(tokens_of(rows, length))
    inputs, targets = (tokens[:, places].contiguous() for places in (slice(0, -1), slice(1, None)))

    def step() -> float:
        # Labels that are already shifted: the loss is of all `length` tokens.
        out = model(inputs, labels=inputs, shift_labels=targets, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss.detach())

    return step


def work(which: str, rows: int, length: int, has_experts: bool) -> None:
    """A process: for each line that comes in, a run of steps, and its seconds, last loss and peak memory go out."""
    step = {"ours": ours, "theirs": theirs}[which](rows, length, has_experts)
    for _ in sys.stdin:
        began, worked = time.perf_counter(), time.process_time()
        losses = [step() for _ in range(STEPS)]
        seconds, cpu = time.perf_counter() - began, time.process_time() - worked
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        told = {"seconds": seconds, "cpu": cpu, "loss": losses[-1], "first": losses[0], "peak": peak}
        print(json.dumps(told), flush=True)


def compile_seconds(rows: int, length: int) -> dict[int, float]:
    """Number of layers -> processor seconds of tracing and compiling a step of as many; the least of two turns."""
    import jax

    from gemma4_jax.train.program import compile_step

    jax.config.update("jax_enable_compilation_cache", False)
    found: dict[int, list[float]] = {num_layers: [] for num_layers in DEPTHS}
    for _ in range(2):
        for num_layers, seconds in found.items():
            jax.clear_caches()
            began = time.process_time()
            compile_step(program_of(rows, length, model_config(num_layers=num_layers)), rows)
            seconds.append(time.process_time() - began)
    return {num_layers: min(seconds) for num_layers, seconds in found.items()}


def measure(rows: int, length: int, rounds: int, *, has_experts: bool = False) -> dict[str, Any]:
    """Tokens per second of the fastest run, least CPU time of a step, losses and peak memory in MiB of both."""
    command = [sys.executable, __file__, f"--rows={rows}", f"--length={length}"]
    command += ["--experts"] if has_experts else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    found: dict[str, list[Any]] = {"ours": [], "theirs": []}
    workers = {which: subprocess.Popen([*command, f"--work={which}"], **pipes) for which in found}
    for _ in range(rounds + 1):
        for which, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            found[which].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {
        which: {
            "cpu_seconds": min(run["cpu"] for run in runs[1:]) / STEPS,
            "tokens_per_second": STEPS * rows * length / min(run["seconds"] for run in runs[1:]),
            "losses": [runs[0]["first"], *(run["loss"] for run in runs)],
            "peak": runs[-1]["peak"],
        }
        for which, runs in found.items()
    }


def main() -> None:
    """Measures, and writes the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    for name, kind in (("work", str), ("rows", int), ("length", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--experts", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.rows, arguments.length, arguments.experts)
        return
    versions = {name: version(name) for name in ("jax", "transformers", "torch")}
    page, figures = TEXT.format(**versions, cores=os.cpu_count(), processor=processor(), chunk=CHUNK), {}
    for name, (rows, length) in CASES.items():
        figures[name] = found = measure(rows, length, arguments.rounds)
        speeds = [found[which]["tokens_per_second"] for which in ("ours", "theirs")]
        peaks = [found[which]["peak"] for which in ("ours", "theirs")]
        cells = [f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", f"{speeds[0] / speeds[1]:.2f}"]
        cells += [f"{peaks[0]:,.0f}", f"{peaks[1]:,.0f}", f"{peaks[0] / peaks[1]:.2f}"]
        page += f"| {name} | {' | '.join(cells)} |\n"
        print(page.splitlines()[-1], flush=True)
    figures["compile_seconds"] = found = compile_seconds(*CASES["1 x 4,096"])
    few, many = DEPTHS
    page += COMPILE_TEXT.format(few=few, many=many, short=found[few], long=found[many], ratio=found[many] / found[few])
    print(page.splitlines()[-1])
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    _, mark, of_loss = PAGE.read_text().partition("\n## The loss\n")  # of benchmarks/loss.py
    PAGE.write_text(page + mark + of_loss)


if __name__ == "__main__":
    main()
