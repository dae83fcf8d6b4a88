"""The command line from a config to an export, and what a second start of it does."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_jax.launch import cli

BENCHMARK = str(Path(__file__).parents[2] / "benchmarks" / "quickstart.py")
TINY = Path(__file__).parents[1] / "train" / "tiny.py"
# One period of layers, a few steps and one batch of held-out images: the shortest run that has every stage.
SHORT = {
    "model.text.num_layers": 2,
    "model.text.num_kv_shared_layers": 0,
    "train.num_steps": 2,
    "optimizer.warmup_steps": 1,
    "evaluators.eval.num_documents": 2,
}


KILLED_EXPORT = """
import os, signal, sys
from gemma4_jax.hf import save
from gemma4_jax.launch import cli

setattr(save, sys.argv[1], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
cli.main(["export", *sys.argv[2:]])
"""


def train(run_dir: Path) -> int:
    fields = SHORT | {"run_dir": run_dir}
    return cli.main(["train", f"--config={TINY}", *(f"--config.{name}={value}" for name, value in fields.items())])


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was written, and what it holds."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.slow
def test_a_run_is_exported_once_and_again_when_there_is_more_of_it(tmp_path, capfd):
    run_dir = tmp_path / "run"
    exported = run_dir / "export"
    assert train(run_dir) == 0
    assert capfd.readouterr().out.endswith(f"wrote {exported}\n")
    first = contents(exported)

    # Started again: it says so, and nothing is touched.
    assert train(run_dir) == 0
    assert capfd.readouterr().out.endswith(f"{run_dir} holds the finished run: there is nothing left to do.\n")
    assert contents(exported) == first

    # By hand: the same export again.
    assert cli.main(["export", str(run_dir), str(tmp_path / "by_hand")]) == 0
    assert capfd.readouterr().out == f"wrote {tmp_path / 'by_hand'}\n"
    by_hand = contents(tmp_path / "by_hand")
    assert {name: data for name, (_, data) in by_hand.items()} == {name: data for name, (_, data) in first.items()}

    # What the run measured of itself.
    benchmark = [sys.executable, BENCHMARK, str(run_dir), "--out", str(tmp_path / "figures.json")]
    printed = subprocess.run(benchmark, check=True, capture_output=True, text=True).stdout
    for figure in ("step time", "tokens per second", "images per second", "compile time", "peak memory", "packing"):
        assert f"\n  {figure}" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["summary"] == json.loads((run_dir / "summary.json").read_text())

    # Killed before the last file is written, or before all of them are put in their place: there is no export.
    for moment in ("write_file", "_publish"):
        out_dir = tmp_path / moment
        command = [sys.executable, "-c", KILLED_EXPORT, moment, str(run_dir), str(out_dir)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not out_dir.exists()
        assert cli.main(["export", str(run_dir), str(out_dir)]) == 0
        assert contents(out_dir).keys() == first.keys()
    capfd.readouterr()

    # Stopped between the end of the training and that of the export.
    shutil.rmtree(exported)
    assert train(run_dir) == 0
    assert capfd.readouterr().out.endswith(f"wrote {exported}\n")
    assert contents(exported).keys() == first.keys()

    # An export older than the last checkpoint is not that of the run as it stands.
    os.utime(exported / "config.json", (0, 0))
    assert train(run_dir) == 0
    assert capfd.readouterr().out.endswith(f"wrote {exported}\n")
    assert json.loads((exported / "config.json").read_text())["model_type"] == "gemma4"
