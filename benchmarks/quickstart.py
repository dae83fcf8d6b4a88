"""The figures of the quickstart: step time, tokens and images per second, compile time, memory, packing efficiency.

  python benchmarks/quickstart.py                   # trains it in a temporary folder, then reads it
  python benchmarks/quickstart.py runs/quickstart   # reads a finished run

Prints a table and writes the same as JSON. Times are medians or totals that the run itself measured.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROWS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("steps", "steps", "{:,}".format),
    ("step time, median", "step_seconds_median", lambda seconds: f"{seconds * 1000:.1f} ms"),
    ("tokens per second", "tokens_per_second", "{:,.0f}".format),
    ("images per second", "images_per_second", "{:,.1f}".format),
    ("compile time", "compile_seconds", "{:.1f} s".format),
    ("waiting for data", "data_wait_share", "{:.1%} of step time".format),
    ("packing efficiency", "packing_efficiency", "{:.1%} of positions hold a token".format),
    ("peak memory", "peak_rss_bytes", lambda size: f"{size / 2**20:,.0f} MiB resident"),
    ("wall time", "wall_seconds", "{:.0f} s".format),
    ("held-out loss", "eval_loss", "{:.3f}".format),
    ("numbers read exactly", "eval_exact_match", "{:.1%} of held-out images".format),
    ("the same, images blanked", "eval_exact_match_blank_images", "{:.1%}".format),
]
"""(label, field of summary.json, how to write it)."""


def read(run_dir: Path) -> dict[str, Any]:
    """The summary of a finished run, and the machine that this is."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text())
    except FileNotFoundError:
        sys.exit(f"{run_dir} holds no summary.json: give the folder of a finished run, or none to train one.")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return {"summary": summary, "machine": machine, "versions": {name: version(name) for name in ("jax", "flax")}}


def train(run_dir: Path) -> None:
    """Runs the quickstart in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "gemma4_jax.launch.train", "--config=quickstart", f"--config.run_dir={run_dir}"]
    subprocess.run(command, check=True)


def main() -> None:
    """Reads or trains, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="?", type=Path, help="a finished run; without it one is trained")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the JSON goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = arguments.run_dir or Path(folder) / "run"
        if arguments.run_dir is None:
            train(run_dir)
        figures = read(run_dir)
    print(f"quickstart on {figures['machine']['cores']} cores, jax {figures['versions']['jax']}")
    for label, field, write in ROWS:
        value = figures["summary"][field]
        print(f"  {label:<26}{'none' if value is None else write(value)}")
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
