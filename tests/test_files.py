from pathlib import Path

import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path, write_atomically


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


def test_the_home_of_the_user_is_expanded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/run") == Path("/home/me/run")
    assert local_path("runs/~x") == Path("runs/~x")
    with pytest.raises(InputError, match="not known here"):
        local_path("~nobody-of-this-name/run")


@pytest.mark.parametrize(
    "address", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run"), "https://x.org/a.json"]
)
def test_an_address_is_refused(address: str | Path):
    with pytest.raises(InputError, match="must be a local path; mount a bucket"):
        local_path(address)
