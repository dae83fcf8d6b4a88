"""What a source's config says of its documents: kind, task, columns, options, and the share that is held out."""

import json
import re

import numpy as np
import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.documents import choose_indices, open_documents
from gemma4_jax.data.sources import KINDS, Source
from gemma4_jax.data.tasks import TASKS
from gemma4_jax.errors import InputError
from gemma4_jax.fields import parse
from gemma4_jax.run_config import DataConfig


def opened(split="train", **fields):
    """The documents of a source, as a config names it."""
    data = parse(DataConfig, {"sources": {"mine": fields}}, "data")
    return open_documents(data.sources["mine"], split=split)


def write(folder, *records):
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


class Numbers(Source):
    """The numbers below another one."""

    columns = ("number", "word")

    def __init__(self, path, below: int = 3, *, word: str):
        self.path, self.below, self.word = path, below, word

    def __len__(self):
        return self.below

    def __getitem__(self, index):
        return {"number": index, "word": self.word}

    def fingerprint(self):
        return {"kind": "numbers", "below": self.below}


def sentence(number, word, mark=".", *, is_loud: bool = False):
    return Document((Text(f"{word} {number}{'!' if is_loud else mark}"),))


@pytest.fixture
def numbers(monkeypatch):
    """Fields of a source of a stranger's own kind and task."""
    monkeypatch.setitem(KINDS, "numbers", Numbers)
    monkeypatch.setitem(TASKS, "sentence", sentence)
    return {"kind": "numbers", "task": "sentence", "path": "here", "options": {"word": "number"}}


def texts(documents):
    return [segment.text for i in range(len(documents)) for segment in documents[i].segments]


def test_options_go_to_the_kind_and_the_task_that_take_them(numbers):
    assert texts(opened(**numbers)) == ["number 0.", "number 1.", "number 2."]
    options = {"word": "n", "below": 1, "is_loud": True}
    assert texts(opened(**numbers | {"options": options})) == ["n 0!"]
    assert texts(opened(**numbers | {"options": {"word": "n", "below": 1, "mark": "?"}})) == ["n 0?"]
    assert opened(**numbers).fingerprint() == {"kind": "numbers", "below": 3}
    assert opened(**numbers)[2].name == "record 2"


def test_a_task_that_takes_all_columns_has_them_by_its_names(tmp_path):
    path = write(tmp_path, {"body": "one"}, {"body": "two", "id": 3})
    documents = opened(path=path, task="segments", columns={"text": "body"})
    assert documents[0].segments == (Text("one"),)
    with pytest.raises(InputError, match="with nothing else"):
        documents[1]


def test_a_record_overrides_neither_a_column_that_is_named_nor_an_option(tmp_path):
    record = {"question": "Hi", "prompt": "no", "completion": "Hello", "last_turn_only": None}
    options = {"last_turn_only": True}
    documents = opened(path=write(tmp_path, record), columns={"prompt": "question"}, options=options)
    assert documents[0].conversation.messages[0]["content"] == "Hi"
    assert documents[0].conversation.num_learned == 1


def test_columns_are_called_what_the_task_calls_them(numbers):
    assert texts(opened(**numbers | {"columns": {"number": "word", "word": "number"}}))[:2] == [
        "0 number.",
        "1 number.",
    ]


MISTAKES = {
    r"options\.wrd='a' is not possible: it must be one of the options below, word, mark, is_loud, soft": {
        "options": {"wrd": "a", "word": "a"}
    },
    r"options\.word is missing": {"options": {}},
    r"options\.below='many' is not possible: it must be a whole number": {"options": {"word": "a", "below": "many"}},
    r"options\.is_loud=1 is not possible: it must be true or false": {"options": {"word": "a", "is_loud": 1}},
    r"columns\.nmbr='number' is not possible: the task 'sentence' reads no column 'nmbr' but number, word, mark": {
        "columns": {"nmbr": "number"}
    },
    r"columns\.number='n' is not possible: .* one of the columns of its records, number, word": {
        "columns": {"number": "n"}
    },
    r"kind='number' is not possible: there are digits, .*, numbers, and the nearest is numbers": {
        "kind": "number"
    },
    r"task='sentences' is not possible: there are auto, .*, sentence, and the nearest is sentence": {
        "task": "sentences"
    },
    r"path='' is not possible: it must be where the records are": {"path": ""},
    r"path='here' is not possible: it must be empty, as 'python' reads no path": {"kind": "python", "options": {}},
    r"held_out=0\.1 is not possible: it must be 0, as 'digits' holds documents back by itself": {
        "kind": "digits", "task": "segments", "path": "", "options": {}, "held_out": 0.1,
    },
    r"options\.seed=3 is not possible: it must be one of the options soft_tokens, soft_token_pixels, max_images": {
        "kind": "digits", "task": "segments", "path": "", "options": {"seed": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named_in_one_sentence(numbers, message):
    with pytest.raises(InputError, match=rf"^data\.sources\.mine\.{message}") as error:
        opened(**numbers | MISTAKES[message])
    assert re.fullmatch(r"[^\n]*\.", str(error.value))


def test_a_record_without_a_column_is_named_with_those_that_it_has(tmp_path):
    documents = opened(path=write(tmp_path, {"title": "a", "body": "b"}), task="text")
    with pytest.raises(InputError, match=r"^mine\.jsonl line 1: it has no column 'text': its columns are title, body"):
        documents[0]


def test_what_is_no_record_is_refused(tmp_path):
    for task in ("text", "segments"):
        with pytest.raises(InputError, match=r"^mine\.jsonl line 2: a record must have columns, and is \[3\]"):
            opened(path=write(tmp_path, {}, [3]), task=task)[1]


def test_a_path_of_a_source_without_files_is_refused(numbers, monkeypatch):
    monkeypatch.setitem(TASKS, "sentence", lambda number: Document((Image("cat.png"),)))
    with pytest.raises(InputError, match=r"^record 0: the image 'cat\.png' is a path, and this source has no files"):
        opened(**numbers)[0]


def test_files_of_a_document_have_no_more_bytes_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma4_jax.data.documents.MAX_FILES_BYTES", 19)
    (tmp_path / "a").write_bytes(b"x" * 10)
    two = {"segments": [{"image": "a"}, {"image": "a"}]}
    documents = opened(path=write(tmp_path, {"segments": two["segments"][:1]}, two))
    assert documents[0].segments == (Image(b"x" * 10, name="a"),)
    with pytest.raises(InputError, match="line 2: its files have more than the 19 bytes"):
        documents[1]


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.99])
def test_the_share_held_out_is_right_and_the_sides_are_disjoint(share):
    n = 1_500_000  # more than one block
    train, held_out = (choose_indices(n, share, is_held_out=side) for side in (False, True))
    assert abs(len(held_out) - share * n) < 5 * np.sqrt(n * share * (1 - share))
    sides = np.zeros(n, int)
    sides[train] += 1
    sides[held_out] += 1
    assert np.all(sides == 1)
    assert held_out.itemsize <= 8
    # No part of the records has another share than the rest.
    parts = np.bincount(held_out // (n // 10), minlength=10)
    assert np.abs(parts - share * n / 10).max() < 6 * np.sqrt(n / 10 * share)


def test_records_that_are_added_behind_move_none_and_a_larger_share_takes_only_more():
    few, many = (choose_indices(n, 0.1, is_held_out=True) for n in (1000, 1_500_000))
    assert np.array_equal(few, many[many < 1000])
    assert set(few) < set(choose_indices(1000, 0.2, is_held_out=True))


def test_the_records_held_out_stay_the_same_from_version_to_version():
    """A run that goes on with a later version must not train on what it evaluated on."""
    assert choose_indices(100, 0.1, is_held_out=True).tolist() == [2, 32, 33, 41, 42, 43, 53, 94, 95]


def test_the_sides_of_a_source_share_its_records_out(tmp_path):
    path = write(tmp_path, *({"text": f"document {i}"} for i in range(50)))
    sides = [texts(opened(split, path=path, held_out=0.2)) for split in ("train", "held_out")]
    assert sorted(sides[0] + sides[1]) == sorted(f"document {i}" for i in range(50))
    assert 2 < len(sides[1]) < 20
    assert opened("held_out", path=path, held_out=0.2)[0].name == f"mine.jsonl line {int(sides[1][0].split()[1]) + 1}"


def test_a_side_without_documents_is_refused(tmp_path):
    path = write(tmp_path, {"text": "one"})
    with pytest.raises(InputError, match=r"'mine' has no documents on the side 'held_out' .*held_out=0\.001"):
        opened("held_out", path=path, held_out=0.001)
