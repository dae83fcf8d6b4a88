"""A run of two real processes: it ends, goes on where it was cut off, with one as well, and both say the same of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def run(run_dir: Path, num_steps: int, count: int = 2) -> list[str]:
    """What so many processes say of a run, once all have ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.integration.two_processes"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={2 // count}")
    environment = {**os.environ, "XLA_FLAGS": flags}
    started = [
        subprocess.Popen(
            [*command, str(process), str(count), port, str(run_dir), str(num_steps)],
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


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_where_it_was_cut_off(tmp_path):
    whole = tmp_path / "whole"
    first, second = run(whole, 4)
    figures = ["eval_loss", "eval_exact_match", "tokens_per_second", "steps"]
    assert all(f"('{name}'" in first for name in figures)
    for name in figures:
        said = [line.partition(f"('{name}', ")[2].partition(")")[0] for line in (first, second)]
        assert said[0] == said[1], name
    assert len(losses(whole)) == 4

    before = losses(whole)
    for count in (2, 1):
        shutil.rmtree(whole / "checkpoints" / "4")  # as if it had been killed before it was whole
        (whole / "summary.json").unlink()
        run(whole, 4, count)
        assert losses(whole) == before
    first, second = run(whole, 4)  # a finished run is left alone by both
    assert first == second
