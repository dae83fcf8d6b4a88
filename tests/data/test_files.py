"""The files of a source: several as one, compressed ones, and what they may cost."""

import ast
import bz2
import gzip
import importlib.util
import io
import json
import lzma
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Text
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.sources import scratch, unpack
from gemma4_jax.data.sources.files import find_files
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig

PIXELS = np.zeros((6, 9, 3), np.uint8)


def opened(path, **fields):
    return open_documents(SourceConfig("mine", path=str(path), **fields))


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(documents):
    return [documents[i].segments[0].text for i in range(len(documents))]


@pytest.fixture
def shards(tmp_path):
    for name, content in {"b": "34", "a": "12", "deep/c": "5"}.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lines(*content))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [("*.jsonl", "1234"), ("**/*.jsonl", "12345"), ("b.jsonl, {}/a.jsonl", "1234"), ("[ab].jsonl,{}/b.jsonl", "1234")],
)
def test_several_files_are_one_source_in_sorted_order(shards, given, expected):
    documents = opened(f"{shards}/{given}".replace("{}", str(shards)))
    assert texts(documents) == list(expected)
    assert documents[len(expected) - 1].name == ("c.jsonl line 1" if "5" in expected else "b.jsonl line 2")
    assert texts(pickle.loads(pickle.dumps(documents))) == list(expected)


def test_all_files_are_what_the_data_is_known_by(shards):
    known = opened(f"{shards}/*.jsonl").fingerprint()
    assert known["files"] == 2
    (shards / "b.jsonl").write_bytes(lines("3", "x"))
    assert opened(f"{shards}/*.jsonl").fingerprint() != known
    assert "files" not in opened(shards / "a.jsonl").fingerprint()


def test_a_name_of_its_own_is_no_pattern(tmp_path):
    (tmp_path / "a[1],b*.jsonl").write_bytes(lines("1"))
    assert texts(opened(tmp_path / "a[1],b*.jsonl")) == ["1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing-*.jsonl", r"^no file is called '.*nothing-\*\.jsonl': mend the pattern"),
        (",", "names no file"),
        ("a*," * 400, r"no file is called 'a\*'"),
    ],
)
def test_a_path_that_means_nothing_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        find_files(given)


def test_images_are_beside_their_own_file_or_in_a_folder_that_is_named(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"image": "a.png", "text": name}))
        PIL.Image.fromarray(PIXELS + len(name) * (name == "two")).save(tmp_path / name / "a.png")
    documents = opened(f"{tmp_path}/*/a.jsonl")
    contents = [(tmp_path / name / "a.png").read_bytes() for name in ("one", "two")]
    assert [documents[i].segments[0].content for i in (0, 1)] == contents
    documents = opened(f"{tmp_path}/*/a.jsonl", options={"files": f"{tmp_path}/two"})
    assert [documents[i].segments[0].content for i in (0, 1)] == [contents[1]] * 2
    with pytest.raises(InputError, match=r"options\.files='nowhere' is not a folder"):
        opened(f"{tmp_path}/*/a.jsonl", options={"files": "nowhere"})
    (tmp_path / "out.jsonl").write_text(json.dumps({"image": "../one/a.png", "text": "a"}))
    with pytest.raises(InputError, match="lies outside"):
        opened(tmp_path / "out.jsonl", options={"files": f"{tmp_path}/two"})[0]


def zstd(data):
    name = next(name for name in ("compression.zstd", "zstandard") if importlib.util.find_spec(name.split(".")[0]))
    return importlib.import_module(name).compress(data)


COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("form", [*COMPRESSORS, "zst"])
def test_compressed_files_are_read(tmp_path, form):
    if form == "zst":
        pytest.importorskip("zstandard")
    path = tmp_path / f"a.jsonl.{form}"
    path.write_bytes({**COMPRESSORS, "zst": zstd}[form](lines("1", "2", "3")))
    documents = opened(path)
    assert texts(documents) == ["1", "2", "3"]
    assert documents[1].name == f"a.jsonl.{form} line 2"
    assert unpack.unpacked(path) == unpack.unpacked(path)  # once
    assert list(tmp_path.iterdir()) == [path]  # and not beside it


def test_a_file_that_unpacks_to_too_much_is_refused_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MAX_UNPACKED_BYTES", 2**23)
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"bomb\.jsonl\.gz: it unpacks to more than 8388608 bytes"):
        opened(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23
    assert not [file for file in Path(scratch.scratch_folder().name).iterdir() if "bomb" in file.name]


def test_a_disk_is_not_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MIN_FREE_BYTES", 2**62)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("1")))
    with pytest.raises(InputError, match="is full: set TMPDIR"):
        opened(tmp_path / "a.jsonl.gz")


def test_zstd_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    for name in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(9))
    with pytest.raises(InputError, match="install zstandard"):
        opened(tmp_path / "a.jsonl.zst")


def test_an_index_without_a_place_is_told_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines("1"))

    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(scratch.tempfile, "mkstemp", refuse)
    with pytest.raises(InputError, match=r"no temporary file can be written \(Read-only file system\): set TMPDIR"):
        opened(tmp_path / "a.jsonl")


def test_another_process_maps_the_same_index(shards):
    """As worker processes do, which are sent the source and not what it knows."""
    documents = opened(f"{shards}/*.jsonl")
    (shards / "pickled").write_bytes(pickle.dumps(documents))
    read = (
        "import pickle, sys; d = pickle.load(open(sys.argv[1], 'rb')); print([d[i].segments[0].text for i in range(4)])"
    )
    command = [sys.executable, "-c", read, str(shards / "pickled")]
    assert ast.literal_eval(subprocess.run(command, check=True, capture_output=True, text=True).stdout) == list("1234")


# Parquet.


@pytest.fixture
def parquet(tmp_path):
    """A function that writes rows, as `datasets` does, and gives the path."""
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    def write(*rows, name="a.parquet", **options):
        arrow.parquet.write_table(arrow.Table.from_pylist(list(rows)), tmp_path / name, **options)
        return tmp_path / name

    return write


def png(pixels=PIXELS):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_rows_by_index(parquet, tmp_path):
    for name, numbers in {"a": range(7), "b": range(7, 10)}.items():
        parquet(*({"text": f"{n}", "id": n} for n in numbers), name=f"{name}.parquet", row_group_size=3)
    documents = opened(f"{tmp_path}/*.parquet", kind="parquet")
    assert texts(documents) == [str(n) for n in range(10)]
    assert [documents[i].segments[0].text for i in (9, 0, 6, 3)] == ["9", "0", "6", "3"]
    assert [documents[i].name for i in (0, 6, 7)] == ["a.parquet row 1", "a.parquet row 7", "b.parquet row 1"]
    assert texts(pickle.loads(pickle.dumps(documents))) == texts(documents)
    with pytest.raises(InputError, match=r"columns\.text='body' .* one of the columns of its records, text, id"):
        opened(f"{tmp_path}/*.parquet", kind="parquet", columns={"text": "body"})


def test_a_row_is_the_same_chat_as_a_line(parquet, tmp_path):
    """Although Arrow gives every message and every schema what another has."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
    records = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "name": "f", "content": "21"},
                {"role": "assistant", "content": "Hello"},
            ],
            "tools": tools,
        },
        {
            "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
            "tools": [{"type": "function", "function": {"name": "g", "parameters": {"properties": {"b": {"n": 1}}}}}],
        },
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], "tools": None},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows, by_line = opened(parquet(*records), kind="parquet"), opened(tmp_path / "a.jsonl")
    assert [rows[i].conversation for i in range(3)] == [by_line[i].conversation for i in range(3)]


def test_images_are_in_the_rows_or_beside_them(parquet, tmp_path):
    said = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    talk = [
        {"role": "user", "content": said},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    (tmp_path / "b.png").write_bytes(png(PIXELS + 1))
    images = [{"bytes": png(), "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    documents = opened(parquet(*({"images": [image], "messages": talk} for image in images)), kind="parquet")
    assert [documents[i].segments[0].content for i in (0, 1)] == [png(), png(PIXELS + 1)]
    assert documents[0].segments[0].name == "a.png"


def test_few_row_groups_are_kept(parquet, monkeypatch):
    from gemma4_jax.data.sources import parquet as module

    monkeypatch.setattr(module, "CACHE_BYTES", 90_000)
    path = parquet(*({"text": f"{n}" * 10_000} for n in range(10, 30)), row_group_size=2)
    source = module.ParquetSource(str(path))
    for index in (0, 1, 5, 19, 5, 0):
        assert source[index]["text"][:2] == str(10 + index)
        assert sum(table.nbytes for table in source._kept.values()) <= 90_000
    assert list(source._kept) == [2, 0]  # the last that were used


def test_what_is_too_large_is_refused_before_it_is_read(parquet, monkeypatch):
    from gemma4_jax.data.sources import parquet as module

    path = parquet({"text": "small"}, {"text": "x" * 5000})
    monkeypatch.setattr(module, "MAX_ROW_BYTES", 4096)
    documents = opened(path, kind="parquet")
    assert documents[0].segments == (Text("small"),)
    with pytest.raises(InputError, match=r"a\.parquet row 2: a row of 50\d\d bytes is refused: at most 4096"):
        documents[1]
    monkeypatch.setattr(module, "MAX_GROUP_ROWS", 1)
    with pytest.raises(InputError, match=r"a row group of 2 rows .* smaller row_group_size"):
        opened(path, kind="parquet")


def test_parquet_that_is_none_is_refused(parquet, tmp_path, monkeypatch):
    path = parquet({"text": "a"})
    parquet({"body": "a"}, name="b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has the columns body, and .*a\.parquet has text: make two"):
        opened(f"{tmp_path}/*.parquet", kind="parquet")
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"", b"PAR1" + bytes(99)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet cannot be read as Parquet \("):
            opened(path, kind="parquet")
    path.write_bytes(whole[:4] + bytes(40) + whole[44:])  # the footer still stands
    with pytest.raises(InputError, match=r"a\.parquet row 1: it cannot be read \("):
        opened(path, kind="parquet")[0]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="install it, as"):
        opened(path, kind="parquet")
