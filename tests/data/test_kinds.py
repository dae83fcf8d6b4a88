"""Text files, ArrayRecord, and folders that `datasets` saved: what each record is, and what is refused."""

import io
import json
import os
import pickle
import sys

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.documents import open_documents
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig


def opened(kind, path, **fields):
    return open_documents(SourceConfig("mine", kind=kind, path=str(path), **fields))


def png():
    file = io.BytesIO()
    PIL.Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


# Text files.


def test_every_file_is_a_document(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, content in {
        "b.txt": b"two",
        "a.txt": "\ufeffäne".encode(),
        "deep/c.md": b"three\r\n",
        ".hidden": b"no",
    }.items():
        (tmp_path / name).write_bytes(content)
    documents = opened("text", tmp_path)
    assert [documents[i].segments for i in range(3)] == [(Text(t),) for t in ("äne", "two", "three\r\n")]
    assert documents[2].name == f"{tmp_path}/deep/c.md"
    assert len(opened("text", f"{tmp_path}/*.txt")) == 2
    documents = opened("text", f"{tmp_path}/b.txt, {tmp_path}/deep")
    assert [documents[i].segments[0].text for i in range(2)] == ["two", "three\r\n"]


def test_a_file_that_is_no_text_is_left_out_alone(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\0")
    (tmp_path / "b.txt").write_bytes(b"a\0b")
    (tmp_path / "c.txt").write_bytes(b"a" * (2**22 + 1))
    (tmp_path / "d.txt").write_bytes(b"good")
    documents = opened("text", f"{tmp_path}/*.txt")
    for i, message in enumerate(["is not text in UTF-8", "is binary", "a file of 4194305 bytes is refused"]):
        with pytest.raises(InputError, match=f"{'abc'[i]}.txt: .*{message}"):
            documents[i]
    assert documents[3].segments == (Text("good"),)
    os.remove(tmp_path / "d.txt")
    with pytest.raises(InputError, match="it is not a file"):
        documents[3]
    monkeypatch.setattr("gemma4_jax.data.sources.text_files.MAX_FILES", 1)
    with pytest.raises(InputError, match="brings 3 files, and at most 1 are read"):
        opened("text", tmp_path)


# ArrayRecord.


def example(**features):
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    for name, values in features.items():
        feature = message.features.feature[name]
        kind = {bytes: feature.bytes_list, int: feature.int64_list, float: feature.float_list}[type(values[0])]
        kind.value.extend(values)
    return message.SerializeToString()


@pytest.fixture
def write_array_record(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")

    def write(*records, name="a.array_record", options="group_size:1"):
        writer = module.ArrayRecordWriter(str(tmp_path / name), options)
        for record in records:
            writer.write(record)
        writer.close()
        return tmp_path / name

    return write


def test_records_are_json_or_examples(write_array_record):
    path = write_array_record(
        b'{"text": "one"}',
        example(text=[b"two"], id=[3]),
        example(image=[png()], caption=["ä cat".encode()], scores=[0.5, 0.25]),
    )
    documents = opened("arrayrecord", path)
    assert [documents[i] for i in (2, 0, 1)] == [
        Document((Image(png()), Text("ä cat")), "a.array_record record 3"),
        Document((Text("one"),), "a.array_record record 1"),
        Document((Text("two"),), "a.array_record record 2"),
    ]
    again = pickle.loads(pickle.dumps(documents))
    assert again[1] == documents[1]
    assert again.fingerprint() == documents.fingerprint()
    assert "tensorflow" not in sys.modules


def test_several_array_record_files_are_one_source(write_array_record, tmp_path):
    for name, numbers in {"a": range(200), "b": range(200, 203)}.items():
        write_array_record(*(json.dumps({"text": str(n)}).encode() for n in numbers), name=name, options="group_size:7")
    documents = opened("arrayrecord", f"{tmp_path}/[ab]")
    assert [documents[i].segments[0].text for i in range(203)] == [str(n) for n in range(203)]


def test_bad_array_records_are_refused(write_array_record, tmp_path):
    long = b'{"text": "' + b"x" * 2**22 + b'"}'
    path = write_array_record(b"", b"\x80\x04K\x03.", b'{"text": ', b"plain text", b'{"text": "good"}', long)
    documents = opened("arrayrecord", path)
    for i, message in enumerate(["and is neither", "and is neither", "Expecting value", "and is neither"]):
        with pytest.raises(InputError, match=f"a.array_record record {i + 1}: .*{message}"):
            documents[i]
    assert documents[4].segments == (Text("good"),)
    with pytest.raises(InputError, match=r"record 6: a record of 4194316 bytes is refused: at most 4194304"):
        documents[5]
    whole = path.read_bytes()
    for i, damaged in enumerate((b"", b"x" * 70_000, whole[: len(whole) // 2], whole[:-2000])):
        (tmp_path / f"damaged-{i}").write_bytes(damaged)
        with pytest.raises(InputError, match=f"damaged-{i} cannot be read as ArrayRecord"):
            opened("arrayrecord", tmp_path / f"damaged-{i}")
    with pytest.raises(InputError, match="cannot be read: it is no file"):
        opened("arrayrecord", tmp_path)
    with pytest.raises(InputError, match="mount the bucket"):
        opened("arrayrecord", "memory://bucket/a")


def test_a_record_that_was_damaged_is_left_out_alone(write_array_record, tmp_path):
    path = write_array_record(
        *(json.dumps({"text": str(n) * 5000}).encode() for n in range(30)), options="group_size:1,uncompressed"
    )
    content = bytearray(path.read_bytes())
    place = content.index(b"77777")
    content[place : place + 9] = b"#" * 9
    (tmp_path / "b").write_bytes(content)
    documents = opened("arrayrecord", tmp_path / "b")
    with pytest.raises(InputError, match=r"b record 8: it cannot be read"):
        documents[7]
    assert documents[8].segments == (Text("8" * 5000),)


# `datasets` saved to disk.


def save(folder, rows, features=None):
    """Writes rows as `datasets.save_to_disk` does, in files of two rows each."""
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    table = arrow.Table.from_pylist(rows)
    number = -(-len(rows) // 2)
    names = [f"data-{i:05}-of-{number:05}.arrow" for i in range(number)]
    for i, file in enumerate(names):
        with arrow.ipc.new_stream(str(folder / file), table.schema) as stream:
            stream.write_table(table.slice(2 * i, 2), max_chunksize=1)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features or {}}))
    return folder


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_a_saved_data_set_is_read(tmp_path):
    rows = [{"image": {"bytes": png(), "path": None}, "text": f"row {i}", "label": i % 2} for i in range(6)]
    folder = save(tmp_path / "saved", rows, {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}})
    documents = opened("datasets", folder, task="caption", columns={"text": "label"})
    assert [documents[i].segments[1].text for i in range(6)] == ["cat", "dog"] * 3
    assert documents[5] == Document((Image(png()), Text("dog")), "saved row 6")
    again = pickle.loads(pickle.dumps(documents))
    assert again[4] == documents[4]
    with pytest.raises(
        InputError, match=r"columns\.text='body' .* one of the columns of its records, image, text, label"
    ):
        opened("datasets", folder, task="caption", columns={"text": "body"})
    talks = opened("datasets", save(tmp_path / "talks", [{"messages": TALK}] * 2))
    assert list(talks[1].conversation.messages) == TALK


def test_a_folder_that_is_none_is_refused(tmp_path, monkeypatch):
    folder = save(tmp_path / "saved", [{"text": "a"}] * 2)
    for state, message in [
        ("{}", "names no Arrow files"),
        ('{"_data_files": [{"filename": "../saved/data-00000-of-00001.arrow"}]}', "names no Arrow files"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', "names no Arrow files"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow cannot be read as a stream of Arrow"),
        ('{"_data_files": [{"filename": "state.json"}]}', "state.json cannot be read as a stream of Arrow"),
        ("[" * 100_000, "state.json is no JSON"),
    ]:
        (folder / "state.json").write_text(state)
        with pytest.raises(InputError, match=message):
            opened("datasets", folder)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match="holds several splits, train, test: give the folder of one"):
        opened("datasets", tmp_path)
    with pytest.raises(InputError, match=r"nowhere/state.json cannot be read .* that datasets.save_to_disk wrote"):
        opened("datasets", tmp_path / "nowhere")
    with pytest.raises(InputError, match="mount the bucket"):
        opened("datasets", "memory://bucket/a")
    whole = save(tmp_path / "other", [{"text": "a"}] * 2)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="install it, as"):
        opened("datasets", whole)


def test_a_compressed_arrow_file_is_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    (path,) = (folder := save(tmp_path / "saved", [{"text": "a" * 50_000}] * 2)).glob("*.arrow")
    with arrow.ipc.open_stream(str(path)) as stream:
        table = stream.read_all()
    options = arrow.ipc.IpcWriteOptions(compression="zstd")
    path.unlink()
    with arrow.ipc.new_stream(str(path), table.schema, options=options) as stream:
        stream.write_table(table)
    with pytest.raises(InputError, match="it is compressed"):
        opened("datasets", folder)


def test_damaged_arrow_files_end_in_a_sentence(tmp_path):
    """Never in a crash, wherever offsets lead."""
    folder = save(
        tmp_path / "saved", [{"text": "some text " * 9, "list": [1, 2, 3], "image": {"bytes": png(), "path": "a"}}] * 2
    )
    (path,) = folder.glob("*.arrow")
    whole, rng = np.frombuffer(path.read_bytes(), np.uint8), np.random.default_rng(0)
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
        path.unlink()  # else what is still mapped would change
        path.write_bytes(damaged.tobytes())
        try:
            documents = opened("datasets", folder, task="text")
            for i in range(len(documents)):
                documents[i]
        except InputError:
            continue
