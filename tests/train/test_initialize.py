"""What a run begins from, where several processes begin together. The rest is tested by runs that begin so."""

import errno
import os
from pathlib import Path

import jax
import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.train.initialize import _carry


def test_a_file_that_the_first_process_cannot_write_stops_them_all(tmp_path, monkeypatch):
    told: list[int] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    tell = lambda is_well: told.append(int(is_well)) or is_well  # noqa: E731
    monkeypatch.setattr("gemma4_jax.processes.multihost_utils.broadcast_one_to_all", tell)

    def fill_disk(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="cannot be written \\(no space left on device\\)"):
        _carry(fill_disk, tmp_path)
    assert told == [0]
    assert not list(tmp_path.iterdir())
