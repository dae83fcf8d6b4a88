"""SIGTERM and Ctrl-C: what has to be saved is saved, and nothing else is waited for."""

import signal
import subprocess
import sys
import time

import pytest

from gemma4_jax.train.interruption import Interruption

# In the middle of one long call that no Python handler can interrupt, as a compilation is.
BUSY = """
import hashlib, sys
from gemma4_jax.train.interruption import Interruption
with Interruption(lambda text: print(text, flush=True), lambda: print("undone")) as interruption:
    interruption.has_unsaved, interruption.saved_step = sys.argv[1] == "unsaved", 5
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_what_is_unsaved_is_saved_and_then_the_run_leaves(number, name):
    said, before = [], signal.getsignal(number)
    with Interruption(said.append) as interruption:
        assert not interruption.is_due(1)
        interruption.has_unsaved = True
        signal.raise_signal(number)
        ends = time.monotonic() + 60
        while not said and time.monotonic() < ends:
            time.sleep(0.001)
        assert interruption.is_due(1)
        interruption.saved_step = 12
        with pytest.raises(SystemExit) as left:
            interruption.leave()
    assert left.value.code == 128 + number
    assert said[0].startswith(f"{name}: saving the last step; once more ends")
    assert said[1] == f"{name}: saved step 12; the same command goes on from there"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("case", ["saved", "unsaved"])
def test_nothing_to_save_and_the_second_signal_end_at_once(case, number):
    process = subprocess.Popen([sys.executable, "-c", BUSY, case], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(number)
    if case == "unsaved":
        assert "saving the last step" in process.stdout.readline()
        process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert printed.endswith("ended at once; the same command goes on from step 5\nundone\n")


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption(print) as interruption:
            interruption.has_unsaved = True
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            while not interruption.signal:
                time.sleep(0.001)
            assert interruption.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
