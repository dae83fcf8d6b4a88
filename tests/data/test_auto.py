"""A record of a known shape needs no task; of another one it is told which there are."""

import json
from pathlib import Path

import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.tasks import TASKS, auto
from gemma4_jax.data.tasks.auto import SHAPES
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig
from tests.data.test_chat_task import BESIDE, FORMS

TALK = FORMS["messages"]
CAPTION = Document((Image("a.png", name="a.png"), Text("a cat")))


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "a"}, Document((Text("a"),))),
        ({"text": "a", "id": 3, "url": "https://example.org", "meta": {"set": "b"}}, Document((Text("a"),))),
        ({"segments": [{"text": "a"}], "id": 3}, Document((Text("a"),))),
        ({"image": "a.png", "text": "a cat", "width": 3}, CAPTION),
        ({"image": "a.png", "caption": "a cat", "text": None}, CAPTION),
    ],
)
def test_shapes(record, document):
    assert auto(**record) == document


@pytest.mark.parametrize("form", [*FORMS, *BESIDE])
def test_every_form_of_a_chat_is_known(form):
    record = FORMS[form] if form in FORMS else BESIDE[form][0]
    assert auto(**record, id=3) == TASKS["chat"](**record)
    assert auto(**record, text="its rendering") == TASKS["chat"](**record)
    assert auto(**record, last_turn_only=True).conversation.num_learned == 1


def test_every_shape_belongs_to_a_task():
    assert set(SHAPES.values()) < TASKS.keys()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"mesages": [], "id": 1}, r"its columns, mesages, id, are of no known shape: .*nearest is messages\."),
        ({"image": "a", "captions": "b"}, r"the nearest is image and caption\."),
        ({"texts": None}, r"its columns, none, are of no known shape"),
        ({"segments": [{"text": "a"}], **TALK}, r"are of several shapes: name its task, one of chat, segments\."),
        ({"messages": [], **FORMS["conversations"]}, r"several conversations"),
    ],
)  # fmt: skip
def test_another_record_is_refused(record, message):
    with pytest.raises(InputError, match=message):
        auto(**record)


def test_the_shapes_are_told_in_short():
    with pytest.raises(InputError) as error:
        auto(mesages=[])
    assert "segments; messages; conversations; texts; text; instruction and output; prompt and completion; " in str(
        error.value
    )
    assert "image and text or caption; audio and text or transcript or transcription or sentence; " in str(error.value)


def test_a_source_of_no_known_shape_is_refused_as_it_is_opened(tmp_path: Path):
    """Where its columns are known before a record is read; other names for them are those of the config."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(arrow.Table.from_pylist([{"contents": "a", "id": 1}]), path)
    with pytest.raises(InputError, match=r"data.sources.mine: its columns, contents, id, are of no known shape: "):
        open_documents(SourceConfig("mine", kind="parquet", path=path))
    named = SourceConfig("mine", kind="parquet", path=path, columns={"text": "contents"})
    assert open_documents(named)[0].segments == (Text("a"),)


def test_it_is_what_a_source_does_by_default(tmp_path: Path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in ({"text": "a"}, {"dialog": TALK["messages"]})))
    documents = open_documents(SourceConfig("mine", path=str(path), columns={"messages": "dialog"}))
    assert documents[0].segments == (Text("a"),)
    assert list(documents[1].conversation.messages) == TALK["messages"]


def test_a_column_that_is_named_and_not_there_is_told(tmp_path: Path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"dialogue": FORMS["messages"]["messages"], "id": 1}))
    for task in ("chat", "auto"):
        config = SourceConfig("mine", path=str(tmp_path / "mine.jsonl"), task=task, columns={"messages": "dialog"})
        with pytest.raises(InputError, match=r"line 1: .*columns,? dialogue, id.* It has no column 'dialog'"):
            open_documents(config)[0]
