import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gemma4_jax.data.pipeline import EvalItem
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.charts import heat_map, line_chart, ticks
from gemma4_jax.train.evaluate import Reading
from gemma4_jax.train.report import summarize, write_report, write_summary


def record(step: int, **fields) -> dict:
    base = {
        "step": step, "steps": 10, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 750, "images": 6,
        "padding_share": 0.25, "seconds": 2.0, "step_seconds": 0.2, "data_wait_seconds": 0.5,
        "tokens_per_second": 375.0, "expert_load": [[0.4, 0.6], [0.5, 0.5]],
    }  # fmt: skip
    return base | fields


def test_summary_of_records():
    records = [record(10), record(20, tokens=1000, padding_share=0.0), {"step": 20, "eval_loss": 1.0}]
    figures = summarize(records)
    assert figures == {
        "tokens_per_second": 437.5,
        "images_per_second": 3.0,
        "step_seconds_median": 0.2,
        "data_wait_share": 0.25,
        "packing_efficiency": pytest.approx(1750 / 2000),
    }
    assert set(summarize([]).values()) == {0.0}


def test_report_is_one_page_that_needs_nothing_else(tmp_path: Path):
    tokenizer = Tokenizer.load("bundled")
    pixels = np.zeros((16, 24, 3), np.uint8)
    readings = [
        Reading(EvalItem(0, 4, 7, "12", pixels), tokenizer.encode("12"), True),
        Reading(EvalItem(0, 4, 7, "<34>", pixels), tokenizer.encode("74"), False),
    ]
    records = [record(10), {"step": 10, "eval_loss": 2.0, "eval_exact_match": 0.5}, record(20)]
    write_report(tmp_path, "a <run>", {"steps": 20, "eval_loss": 2.0}, records, readings, tokenizer)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|<script|<link", page)
    assert "a &lt;run&gt;" in page
    assert page.count('figure class="right"') == 1
    assert page.count('figure class="wrong"') == 1
    assert "truth &lt;34&gt;\nread  <b>74</b>" in page
    for title in (
        "Loss",
        "Exact match",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Padding",
        "Expert load",
    ):
        assert title in page
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)


def test_summary_is_written_whole(tmp_path: Path):
    write_summary(tmp_path, {"steps": 3, "eval_exact_match": None})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3, "eval_exact_match": None}


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7.3), (5, 5), (0, 0), (1e-7, 3e-7), (0, 1234), (2, 2.0000001)])
def test_ticks_enclose_the_values(low, high):
    places = ticks(low, high)
    assert places[0] <= low
    assert places[-1] >= high
    assert 2 <= len(places) <= 8
    np.testing.assert_allclose(np.diff(places), places[1] - places[0], rtol=1e-6)


def test_charts_of_little_and_of_much():
    assert line_chart("empty", {"a": []}) == ""
    ElementTree.fromstring(line_chart("one & only", {"a": [(1, 2.0)]}))
    long = line_chart("long", {"a": [(i, i % 7) for i in range(10_000)]})
    assert len(long) < 10_000
    ElementTree.fromstring(heat_map("map", [[0, 1, 5], [1, 1, 1]], row_name="expert", column_name="step"))
