from pathlib import Path

import pytest

from gemma4_jax.files import write_atomically


def test_a_file_is_written_in_the_place_of_another(tmp_path: Path):
    path = tmp_path / "file"
    for text in ("old", "new"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \udc00")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
