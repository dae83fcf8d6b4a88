"""A run of two real processes: it ends, goes on where it was cut off, with one as well, and both say the same of it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.launch import command_line
from gemma4_jax.tokenizer import Tokenizer
from tests.train.tiny import typed


def run(run_dir: Path, num_steps: int, count: int = 2, *, axis: str = "fsdp", sources: dict | None = None) -> list[str]:
    """What so many processes say of a run, once all have ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.integration.two_processes"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={2 // count}")
    environment = {**os.environ, "XLA_FLAGS": flags}
    started = [
        subprocess.Popen(
            [*command, str(process), str(count), port, str(run_dir), str(num_steps), axis, json.dumps(sources or {})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(count)
    ]
    said = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * count, [errors[-2000:] for _, errors in said]
    return [output.splitlines()[-1] for output, _ in said]


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of two processes, each of which has half of the rows, and what both said of it."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, run(run_dir, 4)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_where_it_was_cut_off(whole, tmp_path):
    first, second = whole[1]
    figures = ["eval_loss", "eval_exact_match", "tokens_per_second", "steps"]
    assert all(f"('{name}'" in first for name in figures)
    for name in figures:
        said = [line.partition(f"('{name}', ")[2].partition(")")[0] for line in (first, second)]
        assert said[0] == said[1], name
    assert len(losses(whole[0])) == 4

    run_dir, before = shutil.copytree(whole[0], tmp_path / "copy"), losses(whole[0])
    for count in (2, 1):
        shutil.rmtree(run_dir / "checkpoints" / "4")  # as if it had been killed before it was whole
        (run_dir / "summary.json").unlink()
        run(run_dir, 4, count)
        assert losses(run_dir) == before
    first, second = run(run_dir, 4)  # a finished run is left alone by both
    assert first == second


@pytest.mark.slow
def test_two_processes_end_with_their_data_at_the_same_step(tmp_path):
    """The first of them has no rows left in the last batch, and goes on with empty ones."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}" + " and more" * (40 * (i % 8 < 2))}) + "\n" for i in range(24)))
    sources = {"mine": {"path": str(path), "epochs": 1, "at_end": "stop"}}
    run(tmp_path / "run", 50, sources=sources)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data_ended"]
    assert summary["data"]["mine"]["documents"] == 24

    config = command_line.load(Path(__file__).parents[1] / "train" / "tiny.py")
    with config.unlocked():
        config.data.sources = sources
    resolved = typed(config).resolved()
    with contextlib.closing(make_train_iterator(resolved, Tokenizer.load(resolved.tokenizer))) as batches:
        are_full = [next(batches).segment_ids.any(axis=1) for _ in range(summary["steps"] + 1)]
    assert [rows.any() for rows in are_full] == [True] * summary["steps"] + [False]
    assert not are_full[-2][:4].any()


@pytest.mark.slow
def test_processes_that_share_rows_read_the_same_ones(whole, tmp_path):
    """Each has half of the positions of every row: the run is the same, and what both read counts once."""
    run(tmp_path, 4, axis="context")
    # float32 sums in another order: the largest measured error is 1.4e-7 of a loss.
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0]), rtol=1e-6)
    data = [json.loads((run_dir / "summary.json").read_text())["data"] for run_dir in (tmp_path, whole[0])]
    assert data[0] == data[1]
