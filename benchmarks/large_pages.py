"""How much the size of memory pages costs a CPU run: steps of the quickstart with small pages and with large ones.

  python benchmarks/large_pages.py

XLA takes new memory for its buffers at every step, and Linux hands it out page by page. With the setting
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (glibc 2.35) these are large, where /sys/kernel/mm/transparent_hugepage/enabled is
madvise; where it is always, they are large in any case. Prints the median step of each, in turns, and their ratio, and
writes the same as JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 2
OVERRIDES = {
    "train.num_steps": 100,
    "checkpoint.every_steps": 1000,
    "evaluators.eval.every_steps": 1000,
    "evaluators.eval.num_documents": 8,
    "export.at_end": False,
}


def step_seconds(tunables: str) -> float:
    """The median step of a short quickstart in a process with this setting of glibc."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"--config.{name}={value}" for name, value in (OVERRIDES | {"run_dir": f"{folder}/run"}).items()]
        command = [sys.executable, "-m", "gemma4_jax.launch.train", "--config=quickstart", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"GLIBC_TUNABLES": tunables})
        return json.loads(Path(folder, "run", "summary.json").read_text())["step_seconds_median"]


def main() -> None:
    """Measures in turns and prints."""
    settings = {"small": "", "large": "glibc.malloc.hugetlb=1"}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(ROUNDS):
        for name, tunables in settings.items():
            seconds[name].append(step_seconds(tunables))
            print(f"{name} pages: a step takes {seconds[name][-1] * 1000:.0f} ms")
    ratio = statistics.median(seconds["large"]) / statistics.median(seconds["small"])
    print(f"with large pages a step takes {ratio:.2f} of the time")
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps({"step_seconds": seconds, "ratio": ratio}, indent=2) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
