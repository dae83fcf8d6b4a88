import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading

import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.train import lock
from gemma4_jax.train.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from gemma4_jax.train.lock import RunLock
with RunLock(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 1.0)


def of_elsewhere(run_dir):
    owner = {"host": "elsewhere", "process": 7, "since": "2026-01-01T00:00:00+00:00", "machine": "other"}
    run_dir.mkdir()
    (run_dir / "lock").write_text(json.dumps(owner))


def test_one_owner_who_is_named_and_leaves_nothing(tmp_path):
    run_dir = tmp_path / "new" / "run"
    with RunLock(run_dir, print):
        owner = f"in use by process {os.getpid()} on {re.escape(platform.node())} since 20"
        with pytest.raises(InputError, match=owner), RunLock(run_dir, print):
            pass
    with RunLock(run_dir, print) as second:
        second.check()
    assert list(run_dir.iterdir()) == []


def test_a_dead_owner_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid} on"), RunLock(tmp_path, print):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    said = []
    with RunLock(tmp_path, said.append):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    assert said == []  # nothing to wait for: the kernel knows


def test_a_dead_owner_on_another_machine_is_waited_for_once(tmp_path):
    of_elsewhere(tmp_path / "run")
    said = []
    with RunLock(tmp_path / "run", said.append):
        pass
    assert "names process 7 on elsewhere since 2026-01-01T00:00:00+00:00: waiting 1 s" in said[0]


def test_a_living_owner_on_another_machine_is_left_alone(tmp_path):
    of_elsewhere(tmp_path / "run")
    path, is_over = tmp_path / "run" / "lock", threading.Event()

    def live():
        while not is_over.wait(0.02):
            os.utime(path)

    owner = threading.Thread(target=live)
    owner.start()
    try:
        with pytest.raises(InputError, match="in use by process 7 on elsewhere"), RunLock(tmp_path / "run", print):
            pass
    finally:
        is_over.set()
        owner.join()
    assert json.loads(path.read_text())["process"] == 7


def test_an_owner_beats_and_notices_that_it_was_taken_for_dead(tmp_path):
    with RunLock(tmp_path, print) as held:
        path = tmp_path / "lock"
        os.utime(path, (0, 0))
        for _ in range(500):
            if path.stat().st_mtime > 0:
                break
            threading.Event().wait(0.01)
        assert path.stat().st_mtime > 0
        path.write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "now"}))
        with pytest.raises(InputError, match="in use by process 7 on elsewhere"):
            held.check()
    assert json.loads(path.read_text())["process"] == 7  # not ours to remove
