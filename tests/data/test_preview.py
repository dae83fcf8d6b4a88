import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.assemble import assemble
from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.images import image_element, resize_image
from gemma4_jax.data.pack import RowShape
from gemma4_jax.data.preview import preview, preview_html
from gemma4_jax.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
TALL = PIXELS.transpose(1, 0, 2)


@pytest.fixture(scope="module")
def batch(tokenizer, model):
    encode = Encoder(tokenizer, model.vision, 70)
    documents = [
        Document((Image(PIXELS), Text("q? ", loss=False), Text("<script>alert('x')</script>\n"), Image(TALL)), "a"),
        Document((Text("plain & simple"),), "b"),
    ]
    return assemble(
        [[encode(document).read() for document in documents], []], RowShape(352, 4, 1120, 48), tokenizer.tokens
    )


def pictures(page):
    sources = re.findall(r"src=.data:image/png;base64,([^'\"]+).", page)
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB")) for source in sources]


def test_the_page_shows_tokens_images_and_padding(batch, tokenizer, model):
    page = preview_html([batch], tokenizer, model, max_rows=2)
    assert page.count("<section>") == 2
    text = re.sub(r"<[^>]+>", "", page)
    assert "2 documents" in text
    assert "2 images" in text
    assert "plain &amp; simple" in text
    expected = resize_image(PIXELS, patch_size=4, pooling_size=2, max_soft_tokens=70)
    assert any(np.array_equal(picture, expected) for picture in pictures(page))
    assert len(pictures(page)) == 2 + 2 * 2  # images, and two masks a row


def test_the_page_marks_what_is_learned(batch, tokenizer, model):
    page = preview_html([batch], tokenizer, model, max_rows=1)
    marked = re.findall(r"<span class='t loss[^']*' title='[^']*'>(.*?)</span>", page, re.DOTALL)
    assert "".join(marked).startswith("&lt;script&gt;")
    assert not any("q" in token for token in marked[:3])


def test_text_cannot_write_into_the_page(batch, tokenizer, model):
    page = preview_html([batch], tokenizer, model, max_rows=2)
    assert "<script" not in page
    assert "http" not in page  # nothing is fetched from anywhere


def test_hostile_text_of_a_record_is_plain_text(make_config, tmp_path):
    """Names of sources and files, columns, texts, and the reasons that repeat them."""
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>\"' </span></div><style>"
    lines = [
        {"messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]},
        {"image": f"{evil}.png", "text": "a"},
        {evil: 1},
        {"tex<b>": evil},
    ]
    (tmp_path / "<b>.jsonl").write_text("\n".join(map(json.dumps, lines)) + f"\n{{{evil}")
    source = {"<i>'\"": {"path": f"{tmp_path}/<b>.jsonl"}}
    preview(make_config(sources=source, batch_size=1, max_left_out=0.99), tmp_path / "page.html")
    page = Page()
    page.feed((tmp_path / "page.html").read_text("utf-8"))
    page.close()
    assert not page.tags & {"script", "i-", "form", "iframe", "object", "a"}
    assert page.handlers == []
    assert page.depth == 0  # everything that is opened is closed
    assert all(source.startswith("data:image/") for source in page.sources)


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.handlers, self.sources, self.depth = set(), [], [], 0

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        self.depth += tag not in ("img", "meta")

    def handle_endtag(self, tag):
        self.depth -= 1


def test_a_large_image_is_shown_small(tokenizer):
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 900, 3), dtype=np.uint8)
    element = image_element(pixels, "a<b")
    assert 'width="336" height="448"' in element
    assert len(element) < 200_000
    assert "pixelated" not in element
    assert 'alt="a&lt;b"' in element
    thin = image_element(np.zeros((400, 4, 3), np.uint8), "")
    assert 'height="400"' in thin


def test_of_a_long_row_the_beginning_is_shown(batch, tokenizer, model, monkeypatch):
    monkeypatch.setattr("gemma4_jax.data.preview.MAX_ROW_TOKENS", 100)
    page = preview_html([batch], tokenizer, model, max_rows=1)
    assert re.search(r"and \d+ more tokens", page)
    assert "plain" not in page


def test_rows_stop_at_the_most_that_are_shown(batch, tokenizer, model):
    page = preview_html(iter([batch] * 3), tokenizer, model, max_rows=3)
    assert page.count("<section>") == 3


def test_a_config_is_previewed_into_a_file(make_config, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    preview(make_config(), path)
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


TASKS = {
    "segments": {"segments": [{"image": "a.png"}, {"text": "what? ", "loss": False}, {"text": "a cat"}]},
    "text": {"text": "a cat", "id": 3},
    "caption": {"image": "a.png", "prompt": "what? ", "text": "a cat"},
    "interleaved": {"texts": [None, "a cat", None], "images": ["a.png", None, None]},
    "chat": {"image": "a.png", "prompt": "what? ", "completion": "a cat"},
}


@pytest.mark.parametrize("task", TASKS)
def test_the_documents_of_every_task_are_previewed(make_config, tmp_path, task):
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "mine.jsonl").write_text(json.dumps(TASKS[task]))
    source = {"path": f"{tmp_path}/mine.jsonl", "task": task}
    preview(make_config(sources={"mine": source}, batch_size=1), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    learned = re.findall(r"<span class='t loss[^']*' title='[^']*'>(.*?)</span>", page)
    assert "".join(learned).startswith("a cat&lt;turn|&gt;" if task == "chat" else "a cat&lt;eos&gt;")
    num_images = re.search(r"Row 1 <small>[^<]* (\d+) images? ", page)[1]
    assert (num_images != "0") == (task != "text")


def test_documents_left_out_are_listed_with_the_reason(make_config, tmp_path):
    lines = [{"segments": [{"image": "nowhere<.png"}]}, *({"text": f"document {i}"} for i in range(3))]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    preview(make_config(sources={"mine": {"path": f"{tmp_path}/mine.jsonl"}}), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    (listed,) = re.findall(r"<div class='left-out'>.*?</div>", page)
    assert "<b>1 document left out</b>" in listed  # although it comes again and again
    assert "mine.jsonl line 1: the image &#x27;nowhere&lt;.png&#x27;" in listed


def test_a_page_of_one_document_counts_it_as_one(tokenizer, model):
    encode = Encoder(tokenizer, model.vision, 70)
    document = Document((Text("q? ", loss=False), Image(PIXELS)), "one")
    page = preview_html(
        [assemble([[encode(document).read()]], RowShape(352, 4, 1120, 48), tokenizer.tokens)], tokenizer, model, 1
    )
    assert "1 document · 1 image · " in page
    assert "left-out'" not in page


def test_a_place_that_cannot_be_written_is_refused(make_config, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        preview(make_config(), tmp_path / "missing" / "page.html")
    assert list(tmp_path.iterdir()) == []
