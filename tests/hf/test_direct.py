"""Files that are written past the disk cache."""

import errno
import os

import numpy as np
import pytest

from gemma4_jax.hf import direct

BUFFER = 8192


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(direct, "_BUFFER_BYTES", BUFFER)


@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [BUFFER], [BUFFER - 1, 1], [BUFFER + 1], [3 * BUFFER + 5, 0, 7], [5] * 4000]
)
def test_what_is_written_is_there(sizes, tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.bytes(size) for size in sizes]
    direct.write_through(tmp_path / "file", map(memoryview, parts))
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def test_parts_may_be_made_in_the_same_memory(tmp_path):
    memory = np.zeros(5000, np.uint8)

    def parts():
        for value in range(50):
            memory[:] = value
            yield memory.data

    direct.write_through(tmp_path / "file", parts())
    assert (tmp_path / "file").read_bytes() == np.repeat(np.arange(50, dtype=np.uint8), 5000).tobytes()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is no way past the cache")
def test_a_file_system_without_a_way_past_the_cache(tmp_path, monkeypatch):
    """It may refuse at the first write, or when half of a buffer is written."""
    write, calls = os.write, []

    def strict(file, content):
        calls.append(len(content))
        if direct.fcntl.fcntl(file, direct.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, content[:5000])

    monkeypatch.setattr(direct.os, "write", strict)
    content = np.random.default_rng(0).bytes(2 * BUFFER + 3)
    direct.write_through(tmp_path / "file", [memoryview(content)])
    assert (tmp_path / "file").read_bytes() == content
    assert len(calls) > 3


def test_errors_are_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        direct.write_through(tmp_path / "file", [memoryview(b"new")])
    assert (tmp_path / "file").read_bytes() == b"old"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        direct.write_through(tmp_path / "other", [memoryview(bytes(5 * BUFFER))])
