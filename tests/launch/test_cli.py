"""The commands: what they print, and that they hand over to the rooms below."""

import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from gemma4_jax.launch import cli, command_line
from gemma4_jax.train.interruption import Interruption


def test_help_lists_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"gemma4 {command}" in text for command in cli.COMMANDS)
        assert len(text.splitlines()) <= 12


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_is_short(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"gemma4 {command} ")
    assert len(text.splitlines()) <= 25
    if "--config=FILE_OR_NAME" in text:
        assert all(f"  {name} " in text for name in command_line.shipped())


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


def test_train_hands_over_the_config_and_then_exports(monkeypatch, tmp_path):
    calls = []
    stand_in(monkeypatch, "gemma4_jax.train.loop", train=lambda config: calls.append(config.train.num_steps))
    stand_in(monkeypatch, "gemma4_jax.train.initialize", check_source=lambda config: calls.append(config.init.from_hf))
    exports = {"export_run": lambda run_dir, out_dir, keeps_newer: calls.append((run_dir, out_dir, keeps_newer))}
    stand_in(monkeypatch, "gemma4_jax.hf.save", **exports)
    base = ["train", "--config=base", "--config.train.num_steps=77", f"--config.run_dir={tmp_path}"]

    assert cli.main(base) == 0
    assert calls == ["", 77, (str(tmp_path), tmp_path / "export", True)]

    calls.clear()
    assert cli.main([*base, "--config.export.dir=elsewhere"]) == 0
    assert calls == ["", 77, (str(tmp_path), "elsewhere", True)]

    calls.clear()
    assert cli.main([*base, "--config.export.at_end=false", "--config.init.from_hf=release"]) == 0
    assert calls == ["release", 77]

    calls.clear()
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert cli.main([*base, "--config.export.at_end=false", "--config.init.from_hf=gone"]) == 0
    assert calls == [77]  # a run that has a checkpoint goes on from there, whatever became of what it began from


def stand_in(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_export_hands_over_its_two_folders_and_a_dtype(monkeypatch):
    calls = []
    stand_in(monkeypatch, "gemma4_jax.hf.save", export_run=lambda *places, dtype: calls.append((*places, dtype)))
    assert cli.main(["export", "run", "out"]) == 0
    assert cli.main(["export", "--dtype=bfloat16", "run", "out"]) == 0
    assert calls == [("run", "out", None), ("run", "out", "bfloat16")]


def test_an_interrupted_run_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    stand_in(monkeypatch, "gemma4_jax.train.loop", train=interrupt)
    assert cli.main(["train", "--config=base"]) == 130
    assert capsys.readouterr().err == "gemma4: interrupted.\n"


def test_a_terminated_command_cleans_up(monkeypatch):
    events = []

    def export(*_, dtype):
        try:
            signal.raise_signal(signal.SIGTERM)
            events.append("went on")
        finally:
            events.append("cleaned up")

    before = signal.getsignal(signal.SIGTERM)
    stand_in(monkeypatch, "gemma4_jax.hf.save", export_run=export)
    with pytest.raises(SystemExit) as left:
        cli.main(["export", "run", "out"])
    assert left.value.code == 143
    assert events == ["cleaned up"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_handler_of_jax_or_of_train_stays(monkeypatch, tmp_path):
    calls = []

    def note(*_):
        calls.append(signal.getsignal(signal.SIGTERM))

    def train(*_):
        with Interruption(print) as interruption:
            interruption.has_unsaved = True
            signal.raise_signal(signal.SIGTERM)
            calls.append("saves")

    stand_in(monkeypatch, "gemma4_jax.hf.save", export_run=lambda *_, dtype: note())
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    assert cli.main(["export", "run", "out"]) == 0
    monkeypatch.undo()
    stand_in(monkeypatch, "gemma4_jax.train.loop", train=train)
    assert cli.main(["train", "--config=base", "--config.export.at_end=false", f"--config.run_dir={tmp_path}"]) == 0
    assert calls == [before, "saves"]


@pytest.mark.parametrize(
    "program",
    [[str(Path(sys.executable).parent / "gemma4"), "train"], [sys.executable, "-m", "gemma4_jax.launch.train"]],
)
def test_console_script_and_module_are_the_same(program):
    finished = subprocess.run(
        [*program, "--config=quickstart", "--config.seed=-1"], capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "gemma4: seed=-1 is not possible: it must be between 0 and 2**32 - 1.\n"
