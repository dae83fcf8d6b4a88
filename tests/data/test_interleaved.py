"""Documents of the web: texts and images in turn, of which some images are gone."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.iterator import read_counters
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.data.tally import left_out_sentences
from gemma4_jax.data.tasks import TASKS, auto
from gemma4_jax.data.tasks.interleaved import interleaved
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig

PIXELS = np.zeros((6, 9, 3), np.uint8)


def png():
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


def image(content, name=""):
    return Image(content, name=name, may_be_missing=True)


def test_texts_and_images_in_turn():
    texts = [None, "A cat:", "and more.", None, "Both"]
    images = [b"file", None, None, {"bytes": b"two", "path": "b.png"}, "c.png"]
    expected = (
        image(b"file"), Text("A cat:"), Text("\n\nand more."), image(b"two", "b.png"), image("c.png", "c.png"),
        Text("Both"),
    )  # fmt: skip
    assert interleaved(texts, images) == Document(expected)
    assert auto(texts=texts, images=images, metadata="[]") == Document(expected)


def test_what_both_lists_lack_is_an_image_that_is_gone():
    document = interleaved(["a", None, None, "b"], [None, None, {"bytes": None, "path": None}, None])
    assert document == Document((Text("a"), Text("\n\nb")), images_missing=2)


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["a"], [], "two lists of one length, with nulls, and are 1 and 0"),
        ("a", ["b"], "and are 'a' and"),
        ([None], ["https://example.org/a.png"], "is a URL: save the images first"),
        ([None], [3], "an image cannot be 3"),
        ([["a"]], [None], "text cannot be"),
    ],
)
def test_other_lists_are_refused(texts, images, message):
    with pytest.raises(InputError, match=message):
        TASKS["interleaved"](texts=texts, images=images)


@pytest.fixture
def documents(tmp_path):
    """One whole, one of which an image is missing and another is broken, one of which all are."""
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "broken.png").write_bytes(png()[:30])
    records = [
        {"texts": ["one", None], "images": [None, "a.png"]},
        {"texts": [None, "two", None, None], "images": ["gone.png", None, "a.png", "broken.png"]},
        {"texts": [None, "three"], "images": ["../a.png", None]},
    ]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "web.jsonl"


def test_a_document_goes_on_without_its_missing_images(documents, tokenizer, model):
    opened = open_documents(SourceConfig("web", path=str(documents)))
    examples = [Encoder(tokenizer, model.vision, 70)(opened[i]).read() for i in range(3)]
    assert [len(example.images) for example in examples] == [1, 1, 0]
    assert [example.images_missing for example in examples] == [0, 2, 1]
    roles = tokenizer.tokens
    assert [np.sum(example.tokens == roles.begin_image) for example in examples] == [1, 1, 0]
    with pytest.raises(InputError, match="no vision tower"):
        Encoder(tokenizer, None, 70)(opened[0])


def test_missing_images_are_counted_by_source(documents, make_config, tokenizer):
    iterator = make_train_iterator(make_config(sources={"web": {"path": str(documents)}}), tokenizer)
    next(iterator)
    counters = read_counters(iterator)
    iterator.close()
    assert counters["web"]["images_missing"] >= counters["web"]["read"] - 2  # three in every three documents
    assert counters["web"]["unreadable"] == 0
    (sentence,) = left_out_sentences(counters)
    assert sentence == f"{counters['web']['images_missing']} images of 'web' were missing, and left out"
