import gzip
import io
import json
import os
import sys
import tracemalloc

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Image, Text
from gemma4_jax.data.images import read_pixels
from gemma4_jax.data.sources import open_source, records
from gemma4_jax.data.sources.jsonl import JsonlSource
from gemma4_jax.data.sources.python_source import MAX_CHARACTERS, split_lines
from gemma4_jax.data.sources.records import MAX_RECORD_BYTES
from gemma4_jax.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


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
    source = JsonlSource(str(write_lines(tmp_path, {"text": "one"}, "", {"segments": segments})))
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
    source = JsonlSource(str(write_lines(tmp_path, {"text": "fine"}, line)))
    with pytest.raises(InputError, match=r"data\.jsonl line 2: "):
        source[1]
    assert source[0].segments == (Text("fine"),)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(InputError, match="line 1"):
        JsonlSource(str(path))[0]


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
        ("data:image/png;base64,AAAA", "is a URL"),
        (".", "not a file"),
        ("pipe.png", "not a file"),
        ("a\0b", "line 1"),
        ("x" * 5000, "line 1"),
    ]:
        source = JsonlSource(str(write_lines(inside, {"segments": [{"image": path}]})))
        with pytest.raises(InputError, match=message):
            source[0]


def test_a_missing_file_is_refused():
    with pytest.raises(InputError, match=r"'jsonl:/nowhere\.jsonl' cannot be read: No such file"):
        open_source("jsonl:/nowhere.jsonl")


def test_an_array_of_objects_is_read_element_by_element(tmp_path):
    texts = ["ä ü", 'quotes " and ] and \\ ', "third"]
    for form in ({"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}):
        path = tmp_path / "array.json"
        path.write_text(" \n" + json.dumps([{"text": text} for text in texts], **form) + "\n", "utf-8")
        source = JsonlSource(str(path))
        assert [source[i].segments[0].text for i in range(len(source))] == texts
        assert source[2].name == "array.json element 3"


WRONG_FORMS = {
    "begins like a JSON array and is none": b'[{"text": "a"}\n{"text": "b"}]\n',
    "Extra data after the array": b'[{"text": "a"}]\n{"text": "b"}\n',
    "begins like a JSON array": b"[" * 100_000,
    "its first line goes on in the next": b'{\n  "text": "a"\n}\n',
    "compressed by gzip": gzip.compress(b'{"text": "a"}\n'),
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
    with pytest.raises(InputError, match=rf"'jsonl:{path}' .*{message}.*\.$"):
        JsonlSource(str(path))


def test_an_empty_array_has_no_documents(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("[ ]\n")
    with pytest.raises(InputError, match="has no documents"):
        open_source(f"jsonl:{path}")


@pytest.mark.parametrize("place", [".", "pipe", "s3://bucket/data.jsonl"])
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(InputError, match=rf"'jsonl:{place}' is (not a file|a URL)"):
        open_source(f"jsonl:{place}")


def test_a_huge_line_is_neither_held_nor_read(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        file.write('{"text": "one"}\n{"text": "' + "x" * 30_000_000 + '"}\n{"text": "three"}')
    tracemalloc.start()
    source = JsonlSource(str(path))
    with pytest.raises(InputError, match=r"line 2: a record of 30000013 bytes is refused: at most 4194304"):
        source[1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * MAX_RECORD_BYTES
    assert [source[i].segments[0].text for i in (0, 2)] == ["one", "three"]


@pytest.mark.parametrize("kind", [{"text": "a"}, {"image": "a.png"}])
def test_a_document_has_no_more_parts_than_the_limit(tmp_path, kind):
    source = JsonlSource(str(write_lines(tmp_path, {"segments": [kind] * 4097})))
    with pytest.raises(InputError, match=r"4097 segments .* refused"):
        source[0]


def test_a_file_that_went_away_makes_unreadable_documents(tmp_path):
    path = write_lines(tmp_path, {"text": "one"})
    source = JsonlSource(str(path))
    path.unlink()
    with pytest.raises(InputError, match="line 1: the file cannot be read"):
        source[0]


def test_data_is_known_by_what_it_holds(tmp_path, monkeypatch):
    (tmp_path / "moved").mkdir()
    path, moved = (write_lines(folder, {"text": "one"}, {"text": "two"}) for folder in (tmp_path, tmp_path / "moved"))
    monkeypatch.chdir(tmp_path)
    known = open_source(f"jsonl:{path}").fingerprint()
    assert known == open_source(f"jsonl:{moved}").fingerprint() == open_source("jsonl:./data.jsonl").fingerprint()
    for changed in ([{"text": "one"}, {"text": "twO"}], [{"text": "one"}, {"text": "two"}, {"text": "three"}]):
        write_lines(tmp_path, *changed)
        assert open_source(f"jsonl:{path}").fingerprint() != known
    assert json.loads(json.dumps(known)) == known
    assert open_source("digits").fingerprint() == {"kind": "digits", "version": 1}


def test_a_large_file_is_known_by_its_size_and_some_of_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "WHOLE_BYTES", 2**20)
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**30)  # a file of holes
    known = records.file_fingerprint(path)
    for place in (0, 2**30 - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        changed = records.file_fingerprint(path)
        assert changed != known
        known = changed
    os.truncate(path, 2**30 + 1)
    assert records.file_fingerprint(path) != known


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="has no documents"):
        open_source(f"jsonl:{path}")


BAD_SPECS = {
    "images": "of no known kind: the kinds are digits, python, jsonl, tfds",
    "digits:9": "takes no argument",
    "jsonl": "not complete.*jsonl:NAME",
    "jsonl:x?seed=3": "unknown option",
    "tfds:mnist/train?pictures=image": "unknown option.*text, image, prompt, data_dir",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_a_bad_source_is_refused(spec):
    with pytest.raises(InputError, match=BAD_SPECS[spec]):
        open_source(spec)


def test_text_is_cut_between_lines():
    text = "".join("x" * n + "\n" for n in (10, 20, 300, 5, 200, 100, 1))
    pieces = split_lines(text, 256)
    assert "".join(pieces) == text
    assert [len(piece) for piece in pieces] == [32, 301, 207, 103]


def test_python_sources_are_documents_of_bounded_length():
    train, held_out = (open_source("python", split=split) for split in ("train", "held_out"))
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


def test_a_tfds_example_becomes_image_prompt_and_label(data_dir):
    source = open_source(f"tfds:pictures/train?image=image&prompt=what is it? &text=label&data_dir={data_dir}")
    assert len(source) == 5
    names = set()
    for index in range(5):
        image, prompt, label = source[index].segments
        assert isinstance(image, Image)
        np.testing.assert_array_equal(read_pixels(image.content), PIXELS)
        assert prompt == Text("what is it? ", loss=False)
        names.add(label.text)
    assert names == {"cat", "dog"}
    fingerprint = source.fingerprint()
    assert (fingerprint["data_set"], fingerprint["documents"]) == ("pictures/1.0.0/train", 5)
    assert "tensorflow" not in sys.modules


def test_a_tfds_text_feature_is_a_document(data_dir):
    source = open_source(f"tfds:pictures/train[:60%]?text=caption&data_dir={data_dir}")
    assert len(source) == 3
    assert all(source[i].segments[0].text.startswith("picture ") for i in range(3))


def test_a_tfds_source_that_is_not_there_is_refused_in_one_sentence(data_dir):
    for spec, message in [
        (f"tfds:paintings/train?data_dir={data_dir}", "tfds build paintings"),
        (f"tfds:pictures/test?data_dir={data_dir}", "cannot be opened"),
        (f"tfds:pictures?data_dir={data_dir}", "write it as tfds:NAME/SPLIT"),
        (f"tfds:paintings/oil/train?data_dir={data_dir}", "tfds build paintings/oil "),
        (f"tfds:pictures/train?text=colour&data_dir={data_dir}", "no feature 'colour': its features are"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            open_source(spec)
        assert "\n" not in str(error.value)
