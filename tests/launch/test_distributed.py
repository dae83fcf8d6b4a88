"""`gemma4 train --distributed`: processes find each other by themselves, or say in a sentence why not."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from gemma4_jax.launch import cli
from gemma4_jax.processes import ADDRESS, COUNT, INDEX

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "train" / "tiny.py"
SHORT = {
    "model.text.num_layers": 2,
    "model.text.num_kv_shared_layers": 0,
    "model.text.num_experts": 0,  # which take long to compile
    "optimizer.warmup_steps": 1,
    "evaluators.eval.num_documents": 2,
    "mesh.data": 1,
    "mesh.fsdp": 2,
}


def start(folder: Path, num_steps: int, environments: list[dict[str, str]]) -> list[subprocess.Popen]:
    """The command in a process for each environment, all in one run directory; FOLDER/0.out is what the first says."""
    fields = SHORT | {"run_dir": folder / "run", "train.num_steps": num_steps}
    arguments = [f"--config={TINY}", "--distributed", *(f"--config.{name}={value}" for name, value in fields.items())]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    started = []
    for process, environment in enumerate(environments):
        with (folder / f"{process}.out").open("w") as out, (folder / f"{process}.err").open("w") as err:
            command = [sys.executable, "-m", "gemma4_jax.launch.train", *arguments]
            given = {**os.environ, "XLA_FLAGS": flags, **environment}
            started.append(subprocess.Popen(command, stdout=out, stderr=err, env=given))
    return started


def said(folder: Path, process: int) -> list[str]:
    """What a process printed, but for the lines of the library by which CPUs exchange arrays."""
    return [line for line in (folder / f"{process}.out").read_text().splitlines() if "[Gloo]" not in line]


def steps(folder: Path) -> list[int]:
    records = (json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if "loss" in record]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_one_run_stop_together_and_go_on(tmp_path):
    # As SLURM starts them; then it takes one of the machines back.
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    job["JAX_COORDINATOR_PORT"] = free_port()
    started = start(tmp_path, 1000, [job | {"SLURM_PROCID": str(process)} for process in range(2)])
    while not any(line.startswith("step 2/") for line in said(tmp_path, 0)):
        assert [process.poll() for process in started] == [None, None], (tmp_path / "0.err").read_text()[-2000:]
        time.sleep(0.2)
    started[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in started] == [128 + signal.SIGTERM] * 2
    saved = re.search(r"SIGTERM: saved step (\d+)", said(tmp_path, 0)[-1])
    assert saved is not None
    assert said(tmp_path, 1) == []  # only the first talks

    # As two machines without a cluster, to its end.
    last = int(saved[1]) + 1
    pair = {ADDRESS: f"localhost:{free_port()}", COUNT: "2"}
    started = start(tmp_path, last, [pair | {INDEX: str(process)} for process in range(2)])
    assert [process.wait(timeout=300) for process in started] == [0, 0], (tmp_path / "0.err").read_text()[-2000:]
    assert f"resumed from the checkpoint of step {saved[1]}" in said(tmp_path, 0)
    assert said(tmp_path, 0)[-1] == f"wrote {tmp_path / 'run' / 'export'}"
    assert said(tmp_path, 1) == []
    assert steps(tmp_path) == list(range(1, last + 1))


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({ADDRESS: "first"}, f"{ADDRESS}='first' is not possible: give HOST:PORT of the first process"),
        ({COUNT: "two"}, f"{COUNT}='two' is not possible: give a whole number, at least 1"),
        ({COUNT: "2", INDEX: "2"}, f"{INDEX}=2 is not possible: with {COUNT}=2 it is one of 0 to 1"),
    ],
)
def test_variables_that_are_not_possible_are_refused(environment, sentence, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", f"--config={TINY}", "--distributed"]) == 2
    assert sentence in capsys.readouterr().err


def initialize(environment: Mapping[str, str]) -> str:
    """The last line that a process says which waits two seconds for the others, and fails."""
    code = "from gemma4_jax import processes; processes.initialize(2)"
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**alone, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1  # by the exception, and not by what JAX does when its own time is over
    return next(line for line in done.stderr.splitlines() if line.startswith("gemma4_jax.errors.InputError: "))


def test_without_a_cluster_it_says_what_to_set():
    line = initialize({ADDRESS: "localhost:1"})
    assert line.endswith(f"set {ADDRESS}=HOST:PORT, {COUNT} and {INDEX}, or leave out --distributed on one machine.")


@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_do_not_meet_end_in_bounded_time(index):
    """The first waits for one that never starts; the second asks at a port where nobody answers."""
    address = f"localhost:{free_port()}"
    line = initialize({ADDRESS: address, COUNT: "2", INDEX: str(index)})
    assert f"have met the first one at {ADDRESS}={address} within 2 s: start the same command on every host" in line


def test_a_port_that_is_taken_is_said_to_be():
    with socket.create_server(("", 0)) as taken:
        line = initialize({ADDRESS: f"localhost:{taken.getsockname()[1]}", COUNT: "2", INDEX: "0"})
    assert "no process can listen at that port of this host" in line
    assert line.endswith("give a free one.")


@pytest.mark.parametrize("job", ["train_slurm.sh", "train_tpu_pod.sh"])
def test_jobs_give_the_flag(job):
    text = (ROOT / "launch" / job).read_text()
    assert "gemma4 train --distributed " in text
    subprocess.run(["bash", "-n", str(ROOT / "launch" / job)], check=True)
