"""Worker processes hear no signal of the terminal, and end with the process that they work for."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

TINY = Path(__file__).parents[1] / "train" / "tiny.py"

READ = f"""
import multiprocessing, pathlib, signal, sys
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.launch import command_line
from gemma4_jax.run_config import RunConfig
from gemma4_jax.tokenizer import Tokenizer

def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = command_line.load(pathlib.Path({str(TINY)!r}))
    config.data.num_workers = 2
    batches = make_train_iterator(RunConfig.from_dict(config.to_dict()).resolved(), Tokenizer.load("bundled"))
    for line in sys.stdin:
        next(batches)
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)

if __name__ == "__main__":
    main()
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def shared_memory(pids: list[int]) -> set[Path]:
    """Blocks of shared memory that these processes have open."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return {Path(path) for path in re.findall(r"/dev/shm/psm_\w+", maps)}


def test_workers_work_on_through_signals_and_end_with_their_parent(tmp_path):
    script = tmp_path / "read.py"
    script.write_text(READ)
    reader = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def take_batch() -> list[int]:
        reader.stdin.write("next\n")
        reader.stdin.flush()
        return [int(pid) for pid in reader.stdout.readline().split()]

    assert take_batch()
    workers = take_batch()  # the second batch is the second worker's
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(reader.pid, number)
    assert all(sorted(take_batch()) == sorted(workers) for _ in range(6))  # more than had been read ahead

    blocks = shared_memory([reader.pid, *workers])
    assert blocks
    reader.kill()
    _, complaints = reader.communicate(timeout=60)  # returns when no process has its end of the pipes any more
    assert "Traceback" not in complaints
    assert "resource_tracker" not in complaints
    ends = time.monotonic() + 30
    while any(map(is_alive, workers)) or any(block.exists() for block in blocks):
        assert time.monotonic() < ends
        time.sleep(0.05)
