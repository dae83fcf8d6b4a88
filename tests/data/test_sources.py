import gzip
import io
import json
import os
import pickle
import random
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.images import read_pixels
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.data.sources import KINDS, Source, fingerprint, records
from gemma4_jax.data.sources.python_source import MAX_CHARACTERS, split_lines
from gemma4_jax.data.sources.records import MAX_RECORD_BYTES
from gemma4_jax.data.tasks import TASKS
from gemma4_jax.errors import InputError
from gemma4_jax.launch import command_line
from gemma4_jax.run_config import RunConfig, SourceConfig

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def opened(kind="jsonl", *, split="train", **fields):
    """The documents of a source."""
    return open_documents(SourceConfig("mine", kind=kind, **fields), split=split)


def jsonl(path):
    return opened(path=str(path))


def png():
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


def write_lines(folder, *records):
    path = folder / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return path


def test_lines_become_documents(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    segments = [{"image": "pictures/a.png", "max_soft_tokens": 70}, {"text": "what? ", "loss": False}, {"text": "ä\n"}]
    source = jsonl(write_lines(tmp_path, {"text": "one"}, "", {"segments": segments}))
    assert len(source) == 2
    assert source[0].segments == (Text("one"),)
    image, question, answer = source[1].segments
    np.testing.assert_array_equal(read_pixels(image.content), PIXELS)
    assert image.max_soft_tokens == 70
    assert (question, answer) == (Text("what? ", loss=False), Text("ä\n"))
    assert source[1].name == "data.jsonl line 3"


BAD_LINES = [
    "not json",
    "[" * 100_000,
    "3",
    "{}",
    '{"text": 3}',
    '{"text": "a", "more": 1}',
    '{"segments": []}',
    '{"segments": "text"}',
    '{"segments": [3]}',
    '{"segments": [{"text": "a", "loss": 1}]}',
    '{"segments": [{"text": "a", "image": "b"}]}',
    '{"segments": [{"image": 3}]}',
    '{"segments": [{"image": "a", "size": 3}]}',
]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_refused_by_its_number(tmp_path, line):
    source = opened(path=str(write_lines(tmp_path, {"text": "fine"}, line)), task="segments")
    with pytest.raises(InputError, match=r"data\.jsonl line 2: "):
        source[1]
    assert source[0].segments == (Text("fine"),)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(InputError, match="line 1"):
        jsonl(path)[0]


def test_images_stay_inside_the_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(inside / "pipe.png")
    (inside / "loop.png").symlink_to("loop.png")
    for path, message in [
        ("../secret.png", "outside"),
        (str(tmp_path / "secret.png"), "outside"),
        ("link.png", "outside"),
        ("missing.png", "'missing.png' is missing: put it into"),
        ("loop.png", "a link that leads back to itself"),
        ("loop.png/a.png", "line 1: the image"),
        ("https://example.org/a.png", "is a URL: save it as a file"),
        ("data:image/png;base64,====", "base64 cannot be read"),
        ("file:///etc/passwd", "is a URL"),
        (".", "not a file"),
        ("pipe.png", "not a file"),
        ("a\0b", "line 1"),
        ("x" * 5000, "line 1"),
    ]:
        source = jsonl(write_lines(inside, {"segments": [{"image": path}]}))
        with pytest.raises(InputError, match=message):
            source[0]


def test_a_missing_file_is_refused():
    with pytest.raises(InputError, match=r"^data\.sources\.mine: /nowhere\.jsonl cannot be read: No such file"):
        jsonl("/nowhere.jsonl")


def test_an_array_of_objects_is_read_element_by_element(tmp_path):
    texts = ["ä ü", 'quotes " and ] and \\ ', "third"]
    for form in ({"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}):
        path = tmp_path / "array.json"
        path.write_text(" \n" + json.dumps([{"text": text} for text in texts], **form) + "\n", "utf-8")
        source = jsonl(path)
        assert [source[i].segments[0].text for i in range(len(source))] == texts
        assert source[2].name == "array.json element 3"


WRONG_FORMS = {
    "begins like a JSON array and is none": b'[{"text": "a"}\n{"text": "b"}]\n',
    "Extra data after the array": b'[{"text": "a"}]\n{"text": "b"}\n',
    "begins like a JSON array": b"[" * 100_000,
    "its first line goes on in the next": b'{\n  "text": "a"\n}\n',
    r"cannot be unpacked \(Compressed file ended": gzip.compress(b'{"text": "a"}\n')[:-9],
    "a ZIP archive": b"PK\x03\x04" + b"\0" * 100,
    "a Parquet file": b"PAR1\x15\x04",
    "text in UTF-16: save it in UTF-8": '{"text": "a"}\n'.encode("utf-16"),
    "binary, or text in UTF-16": '{"text": "a"}\n'.encode("utf-16-le"),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("message", WRONG_FORMS)
def test_a_file_of_another_form_is_refused_by_its_first_bytes(tmp_path, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(WRONG_FORMS[message])
    with pytest.raises(InputError, match=rf"^data\.sources\.mine: {path} .*{message}.*\.$"):
        jsonl(path)


def test_an_empty_array_has_no_documents(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("[ ]\n")
    with pytest.raises(InputError, match="has no documents"):
        jsonl(path)


@pytest.mark.parametrize("place", [".", "pipe"])
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="is not a file"):
        jsonl(place)


def test_a_huge_line_is_neither_held_nor_read(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        file.write('{"text": "one"}\n{"text": "' + "x" * 30_000_000 + '"}\n{"text": "three"}')
    tracemalloc.start()
    source = jsonl(path)
    with pytest.raises(InputError, match=r"line 2: a record of 30000013 bytes is refused: at most 4194304"):
        source[1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * MAX_RECORD_BYTES
    assert [source[i].segments[0].text for i in (0, 2)] == ["one", "three"]


def test_an_index_takes_8_bytes_a_record_of_a_file_and_none_of_memory(tmp_path):
    path = write_lines(tmp_path, *({"text": f"document {i}"} for i in range(5000)), *[""] * 100)
    tracemalloc.start()
    found = records.Records([path])
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(found), found._starts.numbers.nbytes, found._blanks.numbers.nbytes) == (5000, 8 * 5001, 8 * 100)
    assert used < 30_000
    assert records.find_records([path]) is records.find_records([path])  # once in a process
    assert len(pickle.dumps(found)) < 2000  # what a worker process is sent
    assert found.read(4999) == b'{"text": "document 4999"}'


@pytest.mark.parametrize("part_bytes", [1, 3, 7, 64, 2**20])
def test_lines_are_found_in_parts_of_any_size(tmp_path, part_bytes, monkeypatch):
    monkeypatch.setattr(records, "_PART_BYTES", part_bytes)
    rng = random.Random(part_bytes)
    for i in range(30):
        lines = [
            rng.choice([b"", b" ", b"\t  \r", b"{}", b" {}\r", b"1" * rng.randrange(1, 9)])
            for _ in range(rng.randrange(12))
        ]
        paths = [tmp_path / f"{i}-{half}" for half in "ab"]
        for path in paths:
            path.write_bytes(b"\n".join(lines))
        found = records.Records(paths)
        expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        assert [found.read(i) for i in range(len(found))] == [line for _, line in expected] * 2
        names = [f"{path.name} line {number}" for path in paths for number, _ in expected]
        assert [found.name(i) for i in range(len(found))] == names


@pytest.mark.parametrize("depth", [3, 63, 64, 990, 1010, 100_000])
def test_nesting_has_a_limit(depth):
    for value in ("[" * depth + "]" * depth, '{"a": ' * depth + "1" + "}" * depth, "[" * depth):
        content = f'{{"text": "[[\\"[{{{{", "more": {value}}}'.encode()
        if depth < 64 and value.endswith(("]", "}")):
            assert records.parse_json(content)
            continue
        with pytest.raises(InputError, match="nested too deeply" if depth > 63 else "Expecting"):
            records.parse_json(content)
    flat = json.dumps({"text": "[" * 1000 + '\\"' + "{" * 1000, "list": [[]] * 1000})
    assert records.parse_json(flat.encode()) == json.loads(flat)


@pytest.mark.parametrize("kind", [{"text": "a"}, {"image": "a.png"}])
def test_a_document_has_no_more_parts_than_the_limit(tmp_path, kind):
    source = jsonl(write_lines(tmp_path, {"segments": [kind] * 4097}))
    with pytest.raises(InputError, match=r"4097 segments .* refused"):
        source[0]


def test_a_file_that_went_away_makes_unreadable_documents(tmp_path):
    path = write_lines(tmp_path, {"text": "one"})
    source = jsonl(path)
    path.unlink()
    with pytest.raises(InputError, match="line 1: the file cannot be read"):
        source[0]


def test_data_is_known_by_what_it_holds(tmp_path, monkeypatch):
    (tmp_path / "moved").mkdir()
    path, moved = (write_lines(folder, {"text": "one"}, {"text": "two"}) for folder in (tmp_path, tmp_path / "moved"))
    monkeypatch.chdir(tmp_path)
    known = jsonl(path).fingerprint()
    assert known == jsonl(moved).fingerprint() == jsonl("./data.jsonl").fingerprint()
    for changed in ([{"text": "one"}, {"text": "twO"}], [{"text": "one"}, {"text": "two"}, {"text": "three"}]):
        write_lines(tmp_path, *changed)
        assert jsonl(path).fingerprint() != known
    assert json.loads(json.dumps(known)) == known
    assert opened("digits").fingerprint() == {"kind": "digits", "version": 1}


def test_a_large_file_is_known_by_its_size_and_some_of_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 2**20)
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**30)  # a file of holes
    known = fingerprint.file_fingerprint(path)
    for place in (0, 2**30 - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        changed = fingerprint.file_fingerprint(path)
        assert changed != known
        known = changed
    os.truncate(path, 2**30 + 1)
    assert fingerprint.file_fingerprint(path) != known


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="has no documents"):
        jsonl(path)


def test_text_is_cut_between_lines():
    text = "".join("x" * n + "\n" for n in (10, 20, 300, 5, 200, 100, 1))
    pieces = split_lines(text, 256)
    assert "".join(pieces) == text
    assert [len(piece) for piece in pieces] == [32, 301, 207, 103]


def test_python_sources_are_documents_of_bounded_length():
    train, held_out = (opened("python", split=split) for split in ("train", "held_out"))
    assert len(train) > 10 * len(held_out) > 1000
    for source in (train, held_out):
        for index in range(0, len(source), 50):
            (segment,) = source[index].segments
            assert len(segment.text) <= MAX_CHARACTERS or segment.text.count("\n") <= 1


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data set of five labelled pictures, prepared by TensorFlow Datasets."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Pictures(tfds.core.GeneratorBasedBuilder):
        """Pictures of nothing."""

        __module__ = "pictures"  # as in a file of its own, without which TFDS looks for one
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["cat", "dog"])
            features = {"image": tfds.features.Image(), "label": label, "caption": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"image": io.BytesIO(png()), "label": i % 2, "caption": f"picture {i}"}

    folder = tmp_path_factory.mktemp("tfds")
    Pictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


LABELLED = {"task": "caption", "columns": {"text": "label"}}


def test_a_tfds_example_becomes_image_prompt_and_label(data_dir):
    options = {"data_dir": str(data_dir), "prompt": "what is it? "}
    source = opened("tfds", path="pictures/train", options=options, **LABELLED)
    assert len(source) == 5
    names = set()
    for index in range(5):
        image, prompt, label = source[index].segments
        assert isinstance(image, Image)
        np.testing.assert_array_equal(read_pixels(image.content), PIXELS)
        assert prompt == Text("what is it? ", loss=False)
        names.add(label.text)
    assert names == {"cat", "dog"}
    assert source[4].name == "pictures/train 4"
    assert source.fingerprint() == {"kind": "tfds", "data_set": "pictures/1.0.0/train", "documents": 5}
    assert "tensorflow" not in sys.modules


def test_a_tfds_text_feature_is_a_document(data_dir):
    options = {"data_dir": str(data_dir)}
    source = opened("tfds", path="pictures/train[:60%]", task="text", columns={"text": "caption"}, options=options)
    assert len(source) == 3
    assert all(source[i].segments[0].text.startswith("picture ") for i in range(3))


def test_a_tfds_source_that_is_not_there_is_refused_in_one_sentence(data_dir):
    for path, columns, message in [
        ("paintings/train", {}, "tfds build paintings"),
        ("pictures/test", {}, "cannot be opened"),
        ("pictures", {}, "write it as NAME/SPLIT"),
        ("paintings/oil/train", {}, "tfds build paintings/oil "),
        (
            "pictures/train",
            {"text": "colour"},
            r"columns\.text='colour' .* one of .* image, label, caption",
        ),
        ("pictures/train", {}, r"columns\.text='text' .* one of the columns"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            opened("tfds", path=path, task="caption", columns=columns, options={"data_dir": str(data_dir)})
        assert "\n" not in str(error.value)
        assert str(error.value).startswith("data.sources.mine")


STRANGER = """
import csv

from gemma4_jax.configs import base
from gemma4_jax.data.document import Document, Text
from gemma4_jax.data.sources import KINDS, Source
from gemma4_jax.data.tasks import TASKS


class CsvSource(Source):
    def __init__(self, path, separator: str = ","):
        with open(path, newline="") as file:
            self.rows = list(csv.DictReader(file, delimiter=separator))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def fingerprint(self):
        return {"kind": "csv", "documents": len(self)}


def answer(question, answer, *, ask: str = "%s "):
    return Document((Text(ask % question, loss=False), Text(answer)))


KINDS["csv"] = CsvSource
TASKS["answer"] = answer


def get_config():
    config = base.get_config("tiny")
    config.data.images_per_row, config.data.batch_size, config.data.num_workers = 0, 1, 1
    options = {"separator": ";", "ask": "%s? "}
    config.data.sources = {"mine": {"kind": "csv", "path": "mine.csv", "task": "answer", "options": options}}
    return config
"""
"""A config file with a source and a task of its own."""


def test_a_config_file_may_bring_a_source_and_a_task_of_its_own(tmp_path, tokenizer, monkeypatch):
    """Also where a worker process reads."""
    assert len(STRANGER.strip().splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(KINDS, "csv", KINDS.get("csv"))  # taken back at the end
    monkeypatch.setitem(TASKS, "answer", TASKS.get("answer"))
    Path("mine.csv").write_text("question;answer\n" + "".join(f"{i} and 1;{i + 1}\n" for i in range(30)))
    Path("mine.py").write_text(STRANGER)
    config = RunConfig.from_dict(command_line.load(Path("mine.py")).to_dict()).resolved()
    assert_reads(config, tokenizer, {f"<bos>{i} and 1? {i + 1}<eos>" for i in range(30)})


class Squares(Source):
    """A stranger's own, in a module."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return {"number": index}

    def fingerprint(self):
        return {"kind": "squares"}


def square(number):
    return Document((Text(f"{number}: {number**2}"),))


def test_worker_processes_find_what_a_module_brings(make_config, tokenizer, monkeypatch):
    monkeypatch.setitem(KINDS, "squares", Squares)
    monkeypatch.setitem(TASKS, "square", square)
    sources = {"mine": {"kind": "squares", "task": "square"}}
    config = make_config(sources=sources, num_workers=1, batch_size=1)
    assert_reads(config, tokenizer, {f"<bos>{i}: {i**2}<eos>" for i in range(30)})


def assert_reads(config, tokenizer, expected):
    """An epoch of a run has these documents."""
    batches = make_train_iterator(config, tokenizer)
    seen = set()
    for _ in range(20):
        batch = next(batches)
        for segment in range(1, batch.segment_ids.max() + 1):
            seen.add(tokenizer.decode(batch.tokens[batch.segment_ids == segment].tolist()))
    batches.close()
    assert seen == expected
