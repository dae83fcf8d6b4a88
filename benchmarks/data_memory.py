"""Memory of reading images and sounds with two workers, batch after batch, as a line of docs/data.md.

  python benchmarks/data_memory.py [--num_batches=2000]

What the process and its workers hold, shared pages counted once, is told every tenth of the way, and the growth over
the second half at the end.
"""

import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import tempfile
import wave
from pathlib import Path

import numpy as np

from gemma4_jax import sizes
from gemma4_jax.config import AudioConfig
from gemma4_jax.data.iterator import read_counters
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.fields import to_dict
from gemma4_jax.run_config import RunConfig
from gemma4_jax.tokenizer import Tokenizer


def write_sounds(folder: Path, number: int) -> Path:
    """Lines that each name a recording, of noise, of half a second to three seconds."""
    rng = np.random.default_rng(0)
    for i in range(number):
        samples = rng.integers(-(2**12), 2**12, int(16_000 * rng.uniform(0.5, 3)), dtype=np.int16)
        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(16_000)
            sound.writeframes(samples.tobytes())
        (folder / f"{i}.wav").write_bytes(file.getvalue())
    lines = folder / "sounds.jsonl"
    records = ({"segments": [{"audio": f"{i}.wav"}, {"text": f"noise {i}"}]} for i in range(number))
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    return lines


def memory() -> int:
    """Bytes that this process and its workers hold."""
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    lines = (line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_batches", type=int, default=2000)
    num_batches = parser.parse_args().num_batches
    audio = AudioConfig(embed_dim=16, num_layers=1, num_heads=2, subsampling_channels=(8, 4), output_dim=12)
    with tempfile.TemporaryDirectory() as folder:
        data = {
            "sources": {
                "digits": {"kind": "digits"},
                "sounds": {"path": str(write_sounds(Path(folder), 200)), "weight": 0.5},
            },
            "seq_len": 512, "images_per_row": 6, "frames_per_row": 1600, "batch_size": 8, "num_workers": 2,
        }  # fmt: skip
        model = to_dict(dataclasses.replace(sizes.quickstart(), audio=audio))
        config = RunConfig.from_dict({"model": model, "data": data}).resolved()
        batches = make_train_iterator(config, Tokenizer.load("bundled"))
        held = []
        for number in range(1, num_batches + 1):
            next(batches)
            if number % (num_batches // 10) == 0:
                held.append(memory())
                print(f"{number} batches: {held[-1] / 2**20:.0f} MiB", flush=True)
        print({name: counters["documents"] for name, counters in read_counters(batches).items()})
        batches.close()
    slope = np.polyfit(np.arange(5), held[5:], 1)[0] * 5
    print(f"growth over the second half: {slope / 2**20:+.1f} MiB, of {np.mean(held[5:]) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
