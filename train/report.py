"""What a run leaves behind for people: summary.json and report.html, one page that needs nothing else."""

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_jax.data.charts import STYLE, heat_map, line_chart
from gemma4_jax.data.figures import duration, memory, number
from gemma4_jax.data.images import image_element
from gemma4_jax.data.tally import LEFT_OUT
from gemma4_jax.files import write_atomically
from gemma4_jax.train.evaluators.answers import Reading

_MAX_COLUMNS = 120
"""Columns of a heat map over steps, at most."""

_MAX_QUESTION = 300
"""Characters of a question that are shown, its last."""

_STYLE = (
    STYLE
    + """
:root { color-scheme: light dark; --quiet: #555; --bad: #dc2626; --good: #059669; }
@media (prefers-color-scheme: dark) { :root { --quiet: #9aa4b5; --bad: #ff7b7b; --good: #3ddc97; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: 0.1rem 1.2rem 0.1rem 0; text-align: left; font-weight: 400; }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
th { color: var(--quiet); vertical-align: bottom; }
.warning { padding: 0.5rem 0.8rem; border-left: 4px solid #dc2626; background: rgb(220 38 38 / .1); color: var(--bad); }
.data td:last-child, .data th:last-child { text-align: left; } td.many { color: var(--bad); font-weight: 600; }
svg { margin: 0.4rem 0.6rem 0.4rem 0; }
.samples { display: flex; flex-wrap: wrap; gap: 0.8rem; }
figure { margin: 0; padding: 0.5rem; border: 2px solid; border-radius: 6px; text-align: center; }
figure.right { border-color: var(--good); } figure.wrong { border-color: var(--bad); }
img { display: block; margin: 0 auto; max-width: 100%; height: auto; }
figcaption { font: 13px ui-monospace, monospace; white-space: pre; }
.wrong b { color: var(--bad); } .right b { color: var(--good); }
"""
)


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of summary.json that come from the training records of the whole run.

    Returns:
      tokens_per_second, images_per_second, step_seconds_median, data_wait_share (of the time in steps, that the
      devices stood idle for want of data), packing_efficiency (share of token places that are not padding).
    """
    records = [record for record in records if "loss" in record]
    if not records:
        rates = ("tokens_per_second", "images_per_second")
        return dict.fromkeys((*rates, "step_seconds_median", "data_wait_share", "packing_efficiency"), 0.0)
    seconds, tokens, images = (sum(record[name] for record in records) for name in ("seconds", "tokens", "images"))
    return {
        "tokens_per_second": tokens / seconds,
        "images_per_second": images / seconds,
        "step_seconds_median": statistics.median(record["step_seconds"] for record in records),
        "data_wait_share": sum(record["data_wait_seconds"] for record in records) / seconds,
        "packing_efficiency": tokens / sum(record["tokens"] / (1 - record["padding_share"]) for record in records),
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json."""
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


def write_report(
    run_dir: Path,
    name: str,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    readings: Sequence[Reading],
    evaluators: Sequence[str],
) -> None:
    """Writes report.html.

    Args:
      run_dir: of the run.
      name: of the run.
      summary: what summary.json holds.
      records: all of metrics.jsonl.
      readings: held-out questions to show, with what the model answers.
      evaluators: names of those whose figures are in the records.
    """
    sources = summary.get("data", {})
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        *_warnings(sources),
        _table(summary),
        _data_table(sources),
        "<h2>Curves, by step</h2>",
        *_curves(records, evaluators),
        *_expert_load(records),
    ]
    if readings:
        figures = "".join(map(_figure, readings))
        sections.append(f'<h2>Held-out questions, answered by greedy decoding</h2><div class="samples">{figures}</div>')
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title><style>{_STYLE}</style>'
    page = f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(sections)}</body></html>\n"
    write_atomically(run_dir / "report.html", page)


_LABELS = {
    "data_ended": "ended with its data, before train.num_steps",
    "step_seconds_median": "time of a step (median)",
    "data_wait_share": "waiting for data",
    "packing_efficiency": "places of a row that hold tokens",
    "compile_seconds": "compilation",
    "peak_rss_bytes": "host memory at its peak",
    "wall_seconds": "time of this start in all",
}
"""Figures of the summary whose own name, with spaces, would not be clear."""

_COLUMNS = {
    "read": "documents read",
    "documents": "packed",
    "images": "images",
    "split": "split over rows",
    "shortened": "shortened",
    "images_missing": "images missing",
}
"""What the page calls the counters of documents that were not left out."""

_MANY_LEFT_OUT = 0.1
"""Share of documents left out from which on the page warns."""


def _table(summary: Mapping[str, Any]) -> str:
    # What did not happen is no figure: no run need say that its data did not end it.
    shown = {
        name: value for name, value in summary.items() if value is not None and value is not False and name != "data"
    }
    rows = "".join(
        f"<tr><td>{html.escape(_label(name))}</td><td>{_value(name, value)}</td></tr>" for name, value in shown.items()
    )
    return f"<table>{rows}</table>"


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _value(name: str, value: Any) -> str:
    """A figure with its unit, which its name tells."""
    if isinstance(value, Mapping):
        return ", ".join(f"{html.escape(str(inner))} {_value(str(inner), value[inner])}" for inner in value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return html.escape(str(value))
    if "seconds" in name:
        return duration(value)
    if name.endswith("bytes"):
        return memory(value)
    if name.endswith("loss"):
        return f"{number(value)} nats per token"
    if any(part in name for part in ("share", "efficiency", "exact_match")):
        return f"{value:.1%}"
    return number(value)


def _left_out(counters: Mapping[str, int]) -> tuple[str, float]:
    """(how many documents were left out for which reason, their share of those read)."""
    counts = {why: counters[name] for name, why in LEFT_OUT.items() if counters[name]}
    reasons = ", ".join(f"{count:,} {why}" for why, count in counts.items())
    return html.escape(reasons), sum(counts.values()) / max(counters["read"], 1)


def _warnings(sources: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Of sources of which many documents were left out."""
    warnings = []
    for source, counters in sources.items():
        reasons, share = _left_out(counters)
        if share >= _MANY_LEFT_OUT:
            what = f"{share:.0%} of the documents of {html.escape(source)} were left out"
            warnings.append(f'<p class="warning"><b>{what}</b> ({reasons}): the log names them.</p>')
    return warnings


def _data_table(sources: Mapping[str, Mapping[str, int]]) -> str:
    heads = "".join(f"<th>{head}</th>" for head in ("source", *_COLUMNS.values(), "left out"))
    rows = []
    for source, counters in sources.items():
        reasons, share = _left_out(counters)
        cells = "".join(f"<td>{counters[name]:,}</td>" for name in _COLUMNS)
        kind = ' class="many"' if share >= _MANY_LEFT_OUT else ""
        left_out = f"{share:.1%}: {reasons}" if reasons else "none"
        rows.append(f"<tr><td>{html.escape(source)}</td>{cells}<td{kind}>{left_out}</td></tr>")
    return f"<h2>Training data</h2><table class='data'><tr>{heads}</tr>{''.join(rows)}</table>"


def _curves(records: Sequence[Mapping[str, Any]], evaluators: Sequence[str]) -> list[str]:
    def points(name: str, scale: float = 1) -> list[tuple[float, float]]:
        return [(record["step"], scale * record[name]) for record in records if record.get(name) is not None]

    losses = {"train": points("loss")} | {name: points(f"{name}_loss") for name in evaluators}
    shares = {name: points(f"{name}_exact_match", 100) for name in evaluators}
    told = {f"{name}_loss" for name in evaluators} | {f"{name}_exact_match" for name in evaluators}
    figures = sorted({field for record in records if "loss" not in record for field in record} - told - {"step"})
    padding = points("padding_share", 100)
    return [
        line_chart("Loss (nats per token)", losses),
        line_chart("Exact answers (%)", shares, includes=(0, 100)),
        *(line_chart(_label(figure), {figure: points(figure)}) for figure in figures),
        line_chart("Learning rate", {"learning rate": points("learning_rate")}),
        line_chart("Gradient norm", {"gradient norm": points("grad_norm")}, includes=(0,)),
        line_chart("Tokens per second", {"tokens per second": points("tokens_per_second")}, includes=(0,)),
        line_chart("Padding (% of a row)", {"padding": padding}, includes=(0,)),
    ]


def _expert_load(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Load of each expert relative to an even share: over steps, and by layer at the end."""
    loads = [record["expert_load"] for record in records if record.get("expert_load")]
    if not loads:
        return []
    steps = [record["step"] for record in records if record.get("expert_load")]
    num_layers, num_experts = len(loads[0]), len(loads[0][0])
    stride = -(-len(loads) // _MAX_COLUMNS)
    shown, steps = loads[::stride], steps[::stride]
    scale = num_experts / num_layers
    over_steps = [[scale * sum(layer[expert] for layer in load) for load in shown] for expert in range(num_experts)]
    by_layer = [[share * num_experts for share in layer] for layer in loads[-1]]
    return [
        "<h2>Expert load</h2><p>Share of tokens relative to an even spread: white is even, red more, blue less.</p>",
        heat_map("Over steps, mean over layers", over_steps, row_name="expert", column_name="step", columns=steps),
        heat_map("At the end", by_layer, row_name="layer", column_name="expert"),
    ]


def _figure(reading: Reading) -> str:
    verdict = "right" if reading.is_right else "wrong"
    text = html.escape(reading.text) or "(nothing)"
    shown = "" if reading.pixels is None else image_element(reading.pixels, "held-out image")
    question = html.escape(reading.question[-_MAX_QUESTION:])
    return (
        f'<figure class="{verdict}">{shown}<figcaption>{question}\n'
        f"truth {html.escape(reading.truth)}\nwrote <b>{text}</b></figcaption></figure>"
    )
