"""Speed and memory of import and export, beside a plain copy of the same file on the same disk in the same run.

  python benchmarks/hf_io.py --folder /fast/disk          # 8.4 GB of bfloat16; needs four times that on the disk

Makes a synthetic checkpoint of E2B's shape, then, each in a process of its own and from a disk cache without it:
copies the file; imports it; exports the model in memory; saves it as a run; exports the run. Speed is bytes of the
checkpoint over wall time until all is on the disk. Memory is the peak above what the process held when it began and
above the arrays that it has to hold. Prints a table and writes JSON; everything else is deleted.
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import shutil
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

STAGES = ("copy", "import", "export_state", "save_run", "export_run")
BLOCK = 1 << 24


def config_of(gigabytes: float) -> Gemma4Config:
    """E2B without its audio tower, with as many tokens as make the checkpoint about so large in bfloat16."""
    config = SIZES["e2b"]()
    text = config.text
    per_token = 2 * (text.embed_dim + text.num_layers * text.per_layer_embed_dim)
    vocab_size = 262144 - max(0, int((9.6 - gigabytes) * 1e9 / per_token))
    tokens = dataclasses.replace(
        config.tokens, **{name: i for i, name in enumerate(vars(config.tokens))}
    )  # those of the release lie at the end of its vocabulary
    text = dataclasses.replace(text, vocab_size=vocab_size)
    return dataclasses.replace(config, text=text, audio=None, tokens=tokens)


def write_checkpoint(folder: Path, config: Gemma4Config) -> None:
    """One safetensors file of noise, and its config.json."""
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


def load(folder: Path) -> tuple[Any, Gemma4Config]:
    """The checkpoint in memory."""
    import jax.numpy as jnp
    from flax import nnx

    from gemma4_jax.hf.load import Checkpoint, load_state
    from gemma4_jax.model import Gemma4

    checkpoint = Checkpoint(folder)
    abstract = nnx.state(nnx.eval_shape(lambda: Gemma4(checkpoint.config, nnx.Rngs(0), param_dtype=jnp.bfloat16)))
    return load_state(checkpoint, abstract, checkpoint.config), checkpoint.config


def save_run(state: Any, config: Gemma4Config, run_dir: Path) -> None:
    """What a run directory holds of a model."""
    import grain
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gemma4_jax.layers import Buffer
    from gemma4_jax.train.checkpoint import Checkpoints
    from gemma4_jax.train.state import TrainState

    checkpoints = Checkpoints(run_dir, keep=1)
    params, buffers = nnx.split_state(state, nnx.Param, Buffer)
    iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
    checkpoints.save(1, TrainState(jnp.int32(1), params, buffers, (), jax.random.key(0)), iterator)
    checkpoints.close()
    model = {name: None if part is None else vars(part) for name, part in vars(config).items()}
    content = {"model": model, "tokenizer": "bundled", "data": {"soft_tokens_per_image": 280}}
    (run_dir / "config.json").write_text(json.dumps(content))


def run_stage(stage: str, folder: Path) -> dict[str, Any]:
    """One stage, in this process: seconds, bytes, and memory in bytes."""
    from gemma4_jax.hf.save import export_run, export_state
    from gemma4_jax.tokenizer import Tokenizer

    source, out = folder / "in" / "model.safetensors", folder / "out"
    size = source.stat().st_size
    state, config = load(source.parent) if stage in ("export_state", "save_run") else (None, None)
    options: dict[str, Any] = {"tokenizer": Tokenizer.load("bundled"), "max_soft_tokens": 280, "dtype": "bfloat16"}
    work: dict[str, Callable[[], Any]] = {
        "copy": lambda: _copy(source, folder / "copy"),
        "import": lambda: load(source.parent),
        "export_state": lambda: export_state(state, config, out, **options),
        "save_run": lambda: save_run(state, config, folder / "run"),
        "export_run": lambda: export_run(folder / "run", out, dtype="bfloat16"),
    }
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            _forget(path)
    before = _resident()
    start = time.perf_counter()
    kept = work[stage]()
    seconds = time.perf_counter() - start
    held = size if stage == "import" else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del kept
    return {"seconds": seconds, "bytes": size, "memory": max(0, peak - before - held)}


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new, 1 << 26)
        new.flush()
        os.fsync(new.fileno())


def _forget(path: Path) -> None:
    """Drops a file from the disk cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, gigabytes: float) -> dict[str, dict[str, Any]]:
    """All stages, each in a process of its own."""
    write_checkpoint(folder / "in", config_of(gigabytes))
    figures = {}
    for stage in STAGES:
        command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures[stage] = json.loads(printed.splitlines()[-1])
        for made in ("copy", "out"):
            path = folder / made
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return figures


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=8.4, help="size of the checkpoint")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the JSON goes")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, arguments.folder)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(Path(folder), arguments.gigabytes)
    copy = figures["copy"]["bytes"] / figures["copy"]["seconds"]
    print(f"checkpoint of {figures['copy']['bytes'] / 1e9:.2f} GB, {os.cpu_count()} cores")
    for stage, figure in figures.items():
        speed = figure["bytes"] / figure["seconds"]
        print(
            f"  {stage:<14}{figure['seconds']:8.1f} s {speed / 1e9:6.2f} GB/s {speed / copy:6.2f} of the copy "
            f"{figure['memory'] / 1e9:6.2f} GB above"
        )
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
