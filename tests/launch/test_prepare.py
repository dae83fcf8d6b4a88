"""`gemma4 prepare` at the door: what it refuses, and the jobs that call it."""

import re
from pathlib import Path

import pytest

from gemma4_jax.launch import cli, prepare

JOBS = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--out='' is not possible: it must be the folder to write."),
        (["--out=OUT", "--task=2/2"], "--task=2/2 is not possible: it must be i/N, with i from 0 to N - 1."),
        (["--out=OUT", "--task=all"], "--task=all is not possible: it must be i/N, with i from 0 to N - 1."),
        (["--out=OUT", "--source=mine"], "--source='mine' is not possible: it must be one of digits, python."),
        (["--out=gs://bucket/prepared"], "'gs://bucket/prepared' is not possible: it must be a local path"),
    ],
)
def test_what_is_refused(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "--config=quickstart", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", ["prepare_slurm.sh", "prepare_kubernetes.yaml"])
def test_jobs_give_flags_that_there_are(job):
    flags = re.findall(r"--(config|out|task|workers|num_shards|source|\w+)=", (JOBS / job).read_text())
    of_scheduler = {"array"} | set(re.findall(r"#SBATCH --([\w-]+)=", (JOBS / job).read_text()))
    assert {"task", "out", "config", "workers"} <= set(flags)
    assert all(f"--{flag}=" in prepare.help_text() for flag in set(flags) - of_scheduler)
