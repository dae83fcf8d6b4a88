"""What a run leaves behind for people: summary.json and report.html, one page that needs nothing else."""

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_jax.data.images import image_element
from gemma4_jax.files import write_atomically
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.charts import heat_map, line_chart
from gemma4_jax.train.evaluate import Reading

_MAX_COLUMNS = 120
"""Columns of a heat map over steps, at most."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #111; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: 0.1rem 1.2rem 0.1rem 0; } td + td { text-align: right; }
svg { margin: 0.4rem 0.6rem 0.4rem 0; max-width: 100%; height: auto; } .title { font-size: 14px; font-weight: 600; }
.tick { font-size: 11px; fill: #555; } .grid { stroke: #e5e7eb; }
.samples { display: flex; flex-wrap: wrap; gap: 0.8rem; }
figure { margin: 0; padding: 0.5rem; border: 2px solid; border-radius: 6px; text-align: center; }
figure.right { border-color: #059669; } figure.wrong { border-color: #dc2626; }
img { display: block; margin: 0 auto; max-width: 100%; height: auto; }
figcaption { font: 13px ui-monospace, monospace; white-space: pre; }
.wrong b { color: #dc2626; } .right b { color: #059669; }
"""


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
    tokenizer: Tokenizer,
) -> None:
    """Writes report.html.

    Args:
      run_dir: of the run.
      name: of the run.
      summary: what summary.json holds.
      records: all of metrics.jsonl.
      readings: sample images to show, with what the model reads in them.
      tokenizer: decodes the readings.
    """
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        _table(summary),
        "<h2>Curves</h2>",
        *_curves(records),
        *_expert_load(records),
    ]
    if readings:
        figures = "".join(_figure(reading, tokenizer) for reading in readings)
        sections.append(f'<h2>Held-out images, read by greedy decoding</h2><div class="samples">{figures}</div>')
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title><style>{_STYLE}</style>'
    page = f"<!doctype html><html><head>{head}</head><body>{''.join(sections)}</body></html>\n"
    write_atomically(run_dir / "report.html", page)


def _table(summary: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{_value(value)}</td></tr>" for name, value in summary.items())
    return f"<table>{rows}</table>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return html.escape(", ".join(f"{name} {_value(inner)}" for name, inner in value.items()))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else html.escape(str(value))


def _curves(records: Sequence[Mapping[str, Any]]) -> list[str]:
    def points(name: str) -> list[tuple[float, float]]:
        return [(record["step"], record[name]) for record in records if record.get(name) is not None]

    return [
        line_chart("Loss (nats per token)", {"train": points("loss"), "held out": points("eval_loss")}),
        line_chart("Exact match on held-out images", {"exact match": points("eval_exact_match")}, includes=(0, 1)),
        line_chart("Learning rate", {"learning rate": points("learning_rate")}),
        line_chart("Gradient norm", {"gradient norm": points("grad_norm")}, includes=(0,)),
        line_chart("Tokens per second", {"tokens per second": points("tokens_per_second")}, includes=(0,)),
        line_chart("Padding share", {"padding share": points("padding_share")}, includes=(0,)),
    ]


def _expert_load(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Load of each expert relative to an even share: over steps, and by layer at the end."""
    loads = [record["expert_load"] for record in records if record.get("expert_load")]
    if not loads:
        return []
    num_layers, num_experts = len(loads[0]), len(loads[0][0])
    stride = -(-len(loads) // _MAX_COLUMNS)
    shown = loads[::stride]
    scale = num_experts / num_layers
    over_steps = [[scale * sum(layer[expert] for layer in load) for load in shown] for expert in range(num_experts)]
    by_layer = [[share * num_experts for share in layer] for layer in loads[-1]]
    return [
        "<h2>Expert load</h2><p>Share of tokens relative to an even spread: white is even, red more, blue less.</p>",
        heat_map("Over steps, mean over layers", over_steps, row_name="expert", column_name="record"),
        heat_map("At the end", by_layer, row_name="layer", column_name="expert"),
    ]


def _figure(reading: Reading, tokenizer: Tokenizer) -> str:
    verdict = "right" if reading.is_right else "wrong"
    read = html.escape(tokenizer.decode(reading.tokens)) or "(nothing)"
    return (
        f'<figure class="{verdict}">{image_element(reading.item.pixels, "held-out image")}'
        f"<figcaption>truth {html.escape(reading.item.text)}\nread  <b>{read}</b></figcaption></figure>"
    )
