import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gemma4_jax.data.charts import heat_map, line_chart, ticks
from gemma4_jax.data.tally import COUNTERS
from gemma4_jax.train.evaluators.answers import Reading
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
    pixels = np.zeros((16, 24, 3), np.uint8)
    readings = [
        Reading("read: ", "12", "12", True, pixels),
        Reading("what <b>? ", "<34>", "74", False, None),
    ]
    records = [record(10), {"step": 10, "eval_loss": 2.0, "eval_exact_match": 0.5}, record(20)]
    write_report(tmp_path, "a <run>", {"steps": 20, "eval_loss": 2.0}, records, readings, ["eval"])
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|<script|<link", page)
    assert "a &lt;run&gt;" in page
    assert page.count('figure class="right"') == 1
    assert page.count('figure class="wrong"') == 1
    assert "what &lt;b&gt;? \ntruth &lt;34&gt;\nwrote <b>74</b>" in page
    for title in (
        "Loss",
        "Exact answers (%)",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Padding",
        "Expert load",
    ):
        assert title in page
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)


def counted(**counts: int) -> dict[str, int]:
    return dict.fromkeys(COUNTERS, 0) | counts


def shown(tmp_path: Path, summary: dict, records: list[dict] | None = None) -> str:
    """The report of a summary, its text alone."""
    write_report(tmp_path, "run", summary, records or [], [], [])
    page = (tmp_path / "report.html").read_text()
    return " ".join(re.sub(r"<style>.*?</style>|</?b>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_figures_are_for_people(tmp_path: Path):
    summary = {
        "steps": 1200, "eval_loss": 2.12894, "eval_exact_match": None, "tokens_per_second": 4321.5,
        "step_seconds_median": 0.2123, "data_wait_share": 0.004, "compile_seconds": 53.76, "peak_rss_bytes": 1083101184,
        "wall_seconds": 163.1, "parameters": 660_272, "data": {"mine": counted(read=1, documents=1)},
    }  # fmt: skip
    text = shown(tmp_path, summary)
    for words in (
        "steps 1,200 eval loss 2.129 nats per token tokens per second 4,322",
        "time of a step (median) 0.21 s waiting for data 0.4% compilation 53.8 s host memory at its peak 1.0 GiB",
        "time of this start in all 2 min 43 s parameters 660,272",
        "source documents read packed images split over rows shortened images missing left out mine 1 1 0 0 0 0 none",
    ):
        assert words in text
    assert "None" not in text
    assert "_" not in text


@pytest.mark.parametrize(
    ("data", "warning"),
    [
        ({"mine": counted(read=100, documents=91, unreadable=9)}, None),
        (
            {"mine": counted(read=100, documents=90, unreadable=9, dropped=1)},
            "10% of the documents of mine were left out (9 unreadable, 1 too large for a row)",
        ),
        (
            {"a": counted(read=10, documents=10), "<b>": counted(read=10, documents=4, nothing_to_learn=6)},
            "60% of the documents of &lt;b&gt; were left out (6 with nothing to learn)",
        ),
        ({}, None),
    ],
)
def test_many_documents_left_out_are_a_warning(data, warning, tmp_path: Path):
    text = shown(tmp_path, {"steps": 1, "data": data})
    assert ("were left out" in text) == (warning is not None)
    assert warning is None or warning in text
    assert ('class="warning"' in (tmp_path / "report.html").read_text()) == (warning is not None)


@pytest.mark.parametrize("data_ended", [False, True])
def test_a_run_that_ended_with_its_data_says_so_and_no_other_does(data_ended, tmp_path: Path):
    text = shown(tmp_path, {"steps": 7, "eval_loss": 0.0, "data_ended": data_ended})
    assert ("ended with its data" in text) == data_ended
    assert "eval loss" in text  # a figure of zero is one


def test_a_curve_of_one_point_has_axes_to_read():
    """Its step is the last of whole steps from 0; a value of 0 is not the middle of -1 and 1."""

    def labels(chart: str, anchor: str) -> list[str]:
        return re.findall(f'text-anchor="{anchor}" class="tick">([^<]*)<', chart)

    first = line_chart("first", {"a": [(1, 0.0)]})
    assert labels(first, "middle") == ["0", "1"]
    assert labels(first, "end") == ["0", "0.25", "0.5", "0.75", "1"]
    later = line_chart("later", {"a": [(16, 2.0)]})
    assert labels(later, "middle") == ["0", "5", "10", "15"]
    assert labels(later, "end")[0] == "1"


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
    cells = heat_map("map", [[0, 1, 5], [1, 1, 1]], row_name="expert", column_name="step", columns=[10, 20, 30])
    texts = [text.text for text in ElementTree.fromstring(cells).iter("text")]
    assert texts == ["map", "0", "1", "10", "20", "30", "step", "expert"]


def test_the_legend_of_many_lines_is_beside_nothing():
    """Each label has its own place, below the title and above the plot."""
    labels = [f"a source of a long name {i}" for i in range(7)]
    chart = ElementTree.fromstring(
        line_chart("A title of some length", {label: [(1, 2.0), (2, 3.0)] for label in labels})
    )
    places = [(float(t.get("x")), float(t.get("y"))) for t in chart.iter("text") if t.get("class") == "label"]
    assert len(set(places)) == 7
    title = next(float(t.get("y")) for t in chart.iter("text") if t.get("class") == "title")
    top = min(float(line.get("y1")) for line in chart.iter("line"))
    assert all(title + 10 < y < top and x < 400 for x, y in places)
