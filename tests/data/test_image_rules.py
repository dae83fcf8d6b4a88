"""Budgets of images by source, by record and by their size, and how many of them a document may have."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Image
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig

SIZES = {"small": (300, 400), "wide": (400, 800), "large": (1000, 1500)}
"""52, 138 and 651 times 48 x 48 pixels, rounded down."""


@pytest.fixture
def opened(tmp_path):
    """A function from records, and fields of a source, to its documents."""
    for name, (height, width) in SIZES.items():
        file = io.BytesIO()
        PIL.Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
        (tmp_path / f"{name}.png").write_bytes(file.getvalue())

    def open_records(*records, **fields):
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return open_documents(SourceConfig("mine", path=str(tmp_path / "mine.jsonl"), **fields))

    return open_records


def caption(name):
    return {"image": f"{name}.png", "caption": "a cat"}


def budgets_of(document):
    return [segment.max_soft_tokens for segment in document.segments if isinstance(segment, Image)]


@pytest.mark.parametrize(
    ("soft_tokens", "expected"),
    [(None, [None] * 3), (280, [280] * 3), ([70, 140, 280], [70, 140, 280]), ([70, 1120], [70, 1120, 1120])],
)
def test_budgets_of_a_source(opened, soft_tokens, expected):
    options = {} if soft_tokens is None else {"soft_tokens": soft_tokens}
    documents = opened(*map(caption, SIZES), options=options)
    assert [budgets_of(document)[0] for document in map(documents.__getitem__, range(len(documents)))] == expected


def test_the_size_of_what_becomes_a_soft_token_is_an_option(opened):
    documents = opened(caption("small"), options={"soft_tokens": [70, 1120], "soft_token_pixels": 40})
    assert budgets_of(documents[0]) == [1120]  # 75 times 40 x 40 pixels


def test_budgets_of_a_record(opened):
    fields = {"columns": {"soft_tokens": "detail"}, "options": {"soft_tokens": 70}}
    pair = {"texts": [None, None], "images": ["small.png", "large.png"]}
    documents = opened(
        {**caption("small"), "detail": 280}, caption("small"), {**pair, "detail": [140, 560]}, {**pair, "detail": 560},
        **fields,
    )  # fmt: skip
    assert [budgets_of(document) for document in map(documents.__getitem__, range(len(documents)))] == [
        [280],
        [70],
        [140, 560],
        [560, 560],
    ]
    with pytest.raises(InputError, match="column of soft tokens has 1 for 2 images"):
        opened({**pair, "detail": [140]}, **fields)[0]


def test_an_image_spelt_out_keeps_its_budget(opened):
    segments = [{"image": "small.png", "max_soft_tokens": 560}, {"text": "a"}]
    assert budgets_of(opened({"segments": segments}, options={"soft_tokens": 70})[0]) == [560]


def test_a_budget_that_the_run_has_not_is_refused(opened, tokenizer, model):
    documents = opened(caption("small"), options={"soft_tokens": 280})
    with pytest.raises(InputError, match="max_soft_tokens=280 of an image must be one of 70, 140"):
        Encoder(tokenizer, model.vision, 140)(documents[0])


WEB = {"texts": ["a", None, "b", None], "images": [None, "small.png", None, "nowhere.png"]}


def test_a_document_of_the_web_goes_on_without_the_images_behind(opened):
    document = opened(WEB, options={"max_images": 1})[0]
    assert [type(segment).__name__ for segment in document.segments] == ["Text", "Image", "Text"]
    assert document.images_missing == 1


def test_a_question_is_not_parted_from_its_images(opened):
    talk = {"images": ["small.png", "wide.png"], "prompt": "What?", "completion": "Cats."}
    with pytest.raises(InputError, match="line 1: 2 images are refused: a document may have max_images=1"):
        opened(talk, options={"max_images": 1})[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"soft_tokens": 71}, r"options\.soft_tokens=71 must be one of 70, 140, 280, 560, 1120, or a list of these"),
        ({"soft_tokens": []}, r"soft_tokens=\[\] must be"),
        ({"max_images": 999}, r"options\.max_images=999 must be between 0 and 256"),
        ({"soft_token_pixels": 0}, "must be at least 1"),
    ],
)
def test_rules_that_are_not_possible(opened, options, reason):
    with pytest.raises(InputError, match=reason):
        opened(caption("small"), options=options)
