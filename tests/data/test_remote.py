"""Sources in buckets, here fsspec's file system in memory: the records are those of the same files on the disk."""

import gzip
import io
import json
import pickle
import sys
import tarfile

import fsspec
import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.sources import remote
from gemma4_jax.data.sources.fingerprint import file_fingerprint
from gemma4_jax.data.sources.remote import RemotePath
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig


def opened(path, **fields):
    return open_documents(SourceConfig("mine", path=str(path), **fields))


def png():
    file = io.BytesIO()
    PIL.Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def bucket():
    """A function that puts a file into the bucket."""
    memory = fsspec.filesystem("memory")

    def put(name, content):
        memory.pipe_file(f"/bucket/{name}", content)
        return f"memory://bucket/{name}"

    yield put
    memory.rm("/bucket", recursive=True)


def write(folder):
    """Files of every kind, and of each its path and its options."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50)))
    (folder / "b.json").write_text(json.dumps([{"image": "deep/a.png", "text": "a cat"}], indent=1))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (folder / "deep").mkdir()
    (folder / "deep" / "a.png").write_bytes(png())
    with tarfile.open(folder / "d.tar", "w") as tar:
        for name, content in [("1.png", png()), ("1.txt", b"a cat"), ("2.txt", b"a dog")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"row {i}"} for i in range(50)]
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "e.parquet", row_group_size=7)


SOURCES = [
    {"path": "a.jsonl"},
    {"path": "b.json"},
    {"path": "c.jsonl.gz"},
    {"path": "d.tar", "kind": "webdataset"},
    {"path": "e.parquet", "kind": "parquet"},
    {"path": "[ab].json*"},
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source["path"])
def test_a_source_in_a_bucket_is_the_one_on_the_disk(tmp_path, bucket, source, monkeypatch):
    monkeypatch.setattr(remote, "PART_BYTES", 512)
    write(tmp_path)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            bucket(file.relative_to(tmp_path).as_posix(), file.read_bytes())
    here, there = (opened(**{**source, "path": f"{at}/{source['path']}"}) for at in (tmp_path, "memory://bucket"))
    assert len(here) == len(there) > 0
    there = pickle.loads(pickle.dumps(there))
    assert [there[i] for i in range(len(there))] == [here[i] for i in range(len(here))]
    assert there.fingerprint() == here.fingerprint()


def test_files_of_records_stay_inside_their_folder(bucket, tmp_path):
    bucket("other/a.png", png())
    for path, message in [
        ("../other/a.png", "lies outside"),
        ("/other/a.png", "lies outside"),
        ("memory://bucket/other/a.png", "is a URL"),
        ("gone.png", "is missing: put it into memory://bucket/mine"),
        ("deep", "is not a file"),
    ]:
        bucket("mine/deep/a.png", png())
        documents = opened(bucket("mine/a.jsonl", json.dumps({"image": path, "text": "a"}).encode()))
        with pytest.raises(InputError, match=message):
            documents[0]
    documents = opened(
        bucket("mine/b.jsonl", b'{"image": "a.png", "text": "a"}'), options={"files": "memory://bucket/other"}
    )
    assert documents[0].segments[0].content == png()
    with pytest.raises(InputError, match=r"options\.files='memory://bucket/none' is not a folder"):
        opened("memory://bucket/mine/b.jsonl", options={"files": "memory://bucket/none"})


def test_large_files_are_known_by_blocks(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma4_jax.data.sources.fingerprint.WHOLE_BYTES", 2**16)
    content = np.random.default_rng(0).bytes(2**20)
    (tmp_path / "a").write_bytes(content)
    assert file_fingerprint(RemotePath(bucket("a", content))) == file_fingerprint(tmp_path / "a")


class Locked(fsspec.AbstractFileSystem):
    """A store that is asked without credentials."""

    protocol = "locked"

    def info(self, path, **options):
        raise PermissionError("Anonymous caller does not have storage.objects.get access, and\nmore lines")

    def glob(self, path, **options):
        self.info(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "webdataset"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("locked://bucket/a", "locked://bucket/a cannot be read: Anonymous caller does not have .* more lines"),
        ("locked://bucket/*", r"locked://bucket/\* cannot be read: Anonymous caller"),
        ("nothing://bucket/a", "nothing://bucket/a cannot be read: Protocol not known: nothing"),
        ("gs://bucket/a", "gs://bucket/a cannot be read: .*install gcsfs"),
        ("memory://bucket/a", "memory://bucket/a cannot be read: No such file or directory"),
        ("memory://bucket/*", r"no file is called 'memory://bucket/\*'"),
    ],
)  # fmt: skip
def test_a_bucket_that_cannot_be_read_is_told_in_one_sentence(kind, path, message, monkeypatch):
    fsspec.register_implementation("locked", Locked, clobber=True)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=rf"^(data\.sources\.mine: )?{message}") as caught:
        opened(path, kind=kind)
    assert "\n" not in str(caught.value)
