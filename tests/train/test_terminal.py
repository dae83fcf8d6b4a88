import re
import sys

import pytest

from gemma4_jax.launch import cli
from gemma4_jax.train.terminal import Terminal

RECORD = {"step": 10, "steps": 10, "loss": 1.25, "seconds": 5.0, "tokens_per_second": 2000, "images_per_second": 8}


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Terminal(is_shown=True) as terminal:
        with terminal.stage("compiling the step", "compiled the step"):
            assert capsys.readouterr().out == "compiling the step ...\n"  # while it goes on
        assert re.fullmatch(r"compiled the step in \d\.\d s\n", capsys.readouterr().out)
        terminal.show(RECORD, 100)
        terminal.say("saved")
    assert capsys.readouterr().out == "step 10/100  loss 1.2500  2,000 tokens/s  8.0 images/s  eta 0:45\nsaved\n"
    with Terminal(is_shown=False) as terminal, terminal.stage("compiling", "compiled"):
        terminal.show(RECORD, 100)
    assert capsys.readouterr().out == ""


def test_what_failed_is_not_called_done(capsys):
    with Terminal(is_shown=True) as terminal, pytest.raises(ValueError, match="no"), terminal.stage("trying", "tried"):
        raise ValueError("no")
    assert capsys.readouterr().out == "trying ...\n"


def test_a_terminal_shows_bars(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Terminal(is_shown=True) as terminal:
        with terminal.stage("compiling the step", "compiled the step"):
            terminal.say("by the way")
        terminal.show(RECORD, 100)
    shown = capsys.readouterr().out
    for part in ("compiling the step", "0:00:00", "by the way", "compiled the step in", "10/100", "loss 1.2500"):
        assert part in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        assert cli.main(["t\N{LATIN SMALL LETTER A WITH DIAERESIS}rin"]) == 2
        with Terminal(is_shown=True) as terminal:
            terminal.say("report: l\N{LATIN SMALL LETTER A WITH DIAERESIS}uft/\N{SNOWMAN}.html")
    printed = (tmp_path / "out").read_text("ascii")
    assert "'t\\xe4rin' is not a command" in printed
    assert "report: l\\xe4uft/\\u2603.html" in printed
