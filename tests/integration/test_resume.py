"""A run that is stopped, by SIGTERM or by SIGKILL, ends like one that never was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

CONFIG = Path(__file__).parents[1] / "train" / "tiny.py"
NUM_STEPS = 60


def start(run_dir: Path) -> subprocess.Popen:
    # One period of layers compiles in half the time.
    model = {"model.text.num_layers": 2, "model.text.num_kv_shared_layers": 0}
    run = {"run_dir": run_dir, "train.num_steps": NUM_STEPS, "evaluators.eval.num_documents": 4, "export.at_end": False}
    arguments = [f"--config={CONFIG}", *(f"--config.{name}={value}" for name, value in (model | run).items())]
    command = [sys.executable, "-m", "gemma4_jax.launch.train", *arguments]
    # One device, and compiled as users compile: here steps are many.
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_at(run_dir: Path, step: int, how: signal.Signals) -> int:
    """Starts the run, sends it a signal once it has told of `step`, and gives its exit status."""
    run = start(run_dir)
    metrics = run_dir / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.005)
    run.send_signal(how)
    output, _ = run.communicate(timeout=120)
    assert run.returncode in (-how, 128 + how), output
    return run.returncode


def finish(run_dir: Path) -> str:
    run = start(run_dir)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    return output


def latest_step(run_dir: Path) -> int:
    return max(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdecimal())


def final_state(run_dir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint by path: model, optimizer, step and random key."""
    step_dir = run_dir / "checkpoints" / str(NUM_STEPS)
    arrays = {}
    for item in ("model", "training"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(step_dir / item)
        arrays |= {f"{item}{path}": leaf for path, leaf in _leaves(tree)}
    return arrays


def _leaves(tree, path=""):
    if isinstance(tree, dict):
        return [pair for name, value in tree.items() for pair in _leaves(value, f"{path}/{name}")]
    if isinstance(tree, list | tuple):
        return [pair for name, value in enumerate(tree) for pair in _leaves(value, f"{path}/{name}")]
    if jax.dtypes.issubdtype(getattr(tree, "dtype", None), jax.dtypes.prng_key):
        tree = jax.random.key_data(tree)
    return [] if tree is None else [(path, np.asarray(tree))]


def losses(run_dir: Path) -> list[tuple]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("eval_loss"), r.get("tokens"), r.get("images")) for r in records]


@pytest.mark.slow
def test_stopped_and_resumed_is_bit_identical(tmp_path: Path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(whole)
    assert stop_at(stopped, 11, signal.SIGTERM) == 128 + signal.SIGTERM
    # By itself the run saves after every seventh step; SIGTERM leaves a checkpoint of the step it came in.
    assert 11 <= latest_step(stopped) < NUM_STEPS
    stop_at(stopped, latest_step(stopped) + 12, signal.SIGKILL)
    told = max(step for step, loss, *_ in losses(stopped) if loss is not None)
    assert told - latest_step(stopped) <= 7  # however far the files of its last checkpoint had come
    assert f"resumed from the checkpoint of step {latest_step(stopped)}" in finish(stopped)

    expected, resumed = final_state(whole), final_state(stopped)
    assert expected.keys() == resumed.keys()
    for path, array in expected.items():
        assert array.tobytes() == resumed[path].tobytes(), path
    # The same batches in the same order, each step told once.
    assert losses(whole) == losses(stopped)
    data = Path("checkpoints") / str(NUM_STEPS) / "data" / "process_0-of-1.json"
    assert (whole / data).read_bytes() == (stopped / data).read_bytes()
