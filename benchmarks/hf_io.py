"""Speed and memory of import, conversion and export, beside plain copies of the same file on the same disk.

  python benchmarks/hf_io.py --folder /fast/disk      # 8.4 GB of bfloat16; needs five times that on the disk

Makes a synthetic checkpoint of E2B's shape, then, in turn and in a process of its own each: copies the file; imports
it; converts it; exports a model in memory; exports what was converted; exports the checkpoint of a run. Each begins
with nothing in the disk cache, and ends when all it wrote is on the disk. Speed is bytes of the checkpoint over
seconds. Memory is the peak above what the process held when it began, and above the arrays that it was asked for. All
of it is repeated. Prints a table and writes it to docs/hf_io.md, with the rounds in JSON; everything else is deleted.
"""

import argparse
import dataclasses
import json
import math
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma4_jax.config import Gemma4Config
from gemma4_jax.sizes import SIZES

STAGES = {
    "copy": "copy of the file",
    "import": "`load_hf`, to the arrays of a model",
    "convert": "`gemma4 convert`",
    "export_state": "`save_hf`, from a model in memory",
    "export_converted": "`gemma4 export` of what was converted",
    "export_run": "`gemma4 export` of a training run",
}
BLOCK = 1 << 24
PAGE = Path(__file__).parents[1] / "docs" / "hf_io.md"
TEXT = """# Speed and memory of weights going in and out

Written by `benchmarks/hf_io.py`: a synthetic checkpoint of E2B's shape, {gigabytes:.2f} GB of bfloat16, on a machine
with {cores} cores and {memory:.0f} GB of memory. Each line is a process of its own that begins with nothing in the disk
cache and ends when all is on the disk. Medians of {repeats} rounds, ratios within a round; memory is the highest.

| | seconds | GB/s of the checkpoint | speed over the copy's | GB of memory above the start |
| --- | ---: | ---: | ---: | ---: |
{lines}

The arrays that a model is loaded into are not counted as memory above the start, and everything else is. All is in
bfloat16, also the run, whose checkpoint is compressed as training writes it.
"""


def config_of(gigabytes: float) -> Gemma4Config:
    """E2B without its audio tower, with as many tokens as make the checkpoint about so large in bfloat16."""
    config = SIZES["e2b"]()
    text = config.text
    per_token = 2 * (text.embed_dim + text.num_layers * text.per_layer_embed_dim)
    vocab_size = 262144 - max(0, int((9.6 - gigabytes) * 1e9 / per_token)) // 1024 * 1024
    return dataclasses.replace(
        config,
        text=dataclasses.replace(text, vocab_size=vocab_size),
        audio=None,
        tokens=_tokenizer().tokens,  # those of the release lie at the end of its vocabulary
    )


def _tokenizer() -> Any:
    from gemma4_jax.tokenizer import Tokenizer

    return Tokenizer.load("bundled")


def write_checkpoint(folder: Path, config: Gemma4Config) -> None:
    """One safetensors file of noise, its config.json and a tokenizer."""
    from gemma4_jax.hf.config import to_hf
    from gemma4_jax.hf.names import tensors
    from gemma4_jax.hf.safetensors import OutgoingTensor, write_tensor_file

    noise = np.random.default_rng(0).standard_normal(BLOCK, np.float32).astype(ml_dtypes.bfloat16)

    def blocks(size: int) -> Iterator[np.ndarray]:
        for start in range(0, size, BLOCK):
            yield noise[: min(BLOCK, size - start)]

    outgoing = [
        OutgoingTensor(tensor.name, "BF16", tensor.shape, partial(blocks, math.prod(tensor.shape)))
        for tensor in tensors(config)
        if not tensor.is_redundant
    ]
    folder.mkdir()
    write_tensor_file(folder / "model.safetensors", outgoing, {"format": "pt"})
    content = to_hf(config, dtype="bfloat16", max_soft_tokens=280)
    (folder / "config.json").write_text(json.dumps(content))
    shutil.copy(_tokenizer().path, folder)


def load(folder: Path) -> tuple[Any, Gemma4Config]:
    """The checkpoint in memory."""
    import jax.numpy as jnp
    from flax import nnx

    from gemma4_jax.hf.load import Checkpoint, load_state
    from gemma4_jax.model import Gemma4

    checkpoint = Checkpoint(folder)
    abstract = nnx.state(nnx.eval_shape(lambda: Gemma4(checkpoint.config, nnx.Rngs(0), param_dtype=jnp.bfloat16)))
    return load_state(checkpoint, abstract, checkpoint.config), checkpoint.config


def save_run(folder: Path, run_dir: Path) -> None:
    """What a run directory holds of a model, as training writes it."""
    import grain
    import jax.numpy as jnp
    from flax import nnx

    from gemma4_jax.layers import Buffer
    from gemma4_jax.train.checkpoint import Checkpoints
    from gemma4_jax.train.state import TrainState

    state, config = load(folder)
    checkpoints = Checkpoints(run_dir, keep=1)
    params, buffers = nnx.split_state(state, nnx.Param, Buffer)
    iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
    checkpoints.save(1, TrainState(jnp.int32(1), params, buffers, ()), iterator)
    checkpoints.close()
    content = {
        "model": dataclasses.asdict(config),
        "tokenizer": "bundled",
        "data": {"soft_tokens_per_image": 280},
    }
    (run_dir / "config.json").write_text(json.dumps(content))


def run_stage(stage: str, folder: Path) -> dict[str, Any]:
    """One stage, in this process: seconds, bytes, and memory in bytes."""
    from gemma4_jax.hf.convert import convert
    from gemma4_jax.hf.save import export_run, export_state

    source, converted, run_dir, out = (folder / name for name in ("in", "converted", "run", "out"))
    weights = source / "model.safetensors"
    size = weights.stat().st_size
    if stage == "save_run":
        save_run(source, run_dir)
        return {}
    state, config = load(source) if stage == "export_state" else (None, None)
    options: dict[str, Any] = {"tokenizer": _tokenizer(), "max_soft_tokens": 280, "dtype": "bfloat16"}
    work: dict[str, Callable[[], Any]] = {
        "copy": lambda: _copy(weights, out),
        "import": lambda: load(source),
        "convert": lambda: convert(source, converted),
        "export_state": lambda: export_state(state, config, out, **options),
        "export_converted": lambda: export_run(converted, out, dtype="bfloat16"),
        "export_run": lambda: export_run(run_dir, out, dtype="bfloat16"),
    }
    _empty_disk_cache(folder)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    start = time.perf_counter()
    kept = work[stage]()
    if stage != "import":
        _sync(folder)
    seconds = time.perf_counter() - start
    peak = _memory("VmHWM") - before - (size if stage == "import" else 0)
    del kept
    return {"seconds": seconds, "bytes": size, "memory": max(0, peak)}


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new, 1 << 26)
        new.flush()
        os.fsync(new.fileno())


def _sync(folder: Path) -> None:
    """Waits until everything is on the disk, whoever wrote it and whether or not its writer asked."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _empty_disk_cache(folder: Path) -> None:
    """Drops every file here from it."""
    _sync(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure(folder: Path, gigabytes: float, repeats: int, stages: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Every stage in turn, and all of them again."""
    write_checkpoint(folder / "in", config_of(gigabytes))
    if "export_run" in stages:
        _in_a_process("save_run", folder)
    figures: dict[str, list[dict[str, Any]]] = {stage: [] for stage in stages}
    for _ in range(repeats):
        shutil.rmtree(folder / "converted", ignore_errors=True)
        for stage in stages:
            figures[stage].append(_in_a_process(stage, folder))
            print(stage, figures[stage][-1], file=sys.stderr)
            out = folder / "out"
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    return figures


def _in_a_process(stage: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--stage={stage}", f"--folder={folder}"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def summary(figures: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Medians of each stage, and its speed as a part of the copy's in the same round."""
    rows = {}
    for stage, rounds in figures.items():
        ratios = [copy["seconds"] / figure["seconds"] for copy, figure in zip(figures["copy"], rounds, strict=True)]
        seconds = statistics.median(figure["seconds"] for figure in rounds)
        rows[stage] = {
            "seconds": seconds,
            "gigabytes_per_second": rounds[0]["bytes"] / seconds / 1e9,
            "of_the_copy": statistics.median(ratios),
            "gigabytes_above": max(figure["memory"] for figure in rounds) / 1e9,
        }
    return rows


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=8.4, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=3, help="rounds through all stages")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES), help="those to measure")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the JSON goes")
    parser.add_argument("--stage", choices=(*STAGES, "save_run"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, arguments.folder)))
        return
    stages = [stage for stage in STAGES if stage in {"copy", *arguments.stages}]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(Path(folder), arguments.gigabytes, arguments.repeats, stages)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    lines = [
        f"| {STAGES[stage]} | {row['seconds']:.1f} | {row['gigabytes_per_second']:.2f} | "
        f"{row['of_the_copy']:.2f} | {row['gigabytes_above']:.2f} |"
        for stage, row in summary(figures).items()
    ]
    print("\n".join(lines))
    if set(stages) == set(STAGES):
        machine = {"cores": len(os.sched_getaffinity(0)), "memory": os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE / 1e9}
        size = figures["copy"][0]["bytes"] / 1e9
        PAGE.write_text(TEXT.format(**machine, gigabytes=size, repeats=arguments.repeats, lines="\n".join(lines)))


if __name__ == "__main__":
    main()
