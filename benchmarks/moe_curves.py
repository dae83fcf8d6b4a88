"""A model with experts beside a dense one of as many active parameters, trained from scratch on the same tokens.

  python benchmarks/moe_curves.py [--steps=1000]    # about ten minutes on 2 CPU cores

Both read the Python sources that ship with the package, in the same order. Writes the pictures docs/experts_*.svg,
and the figures of docs/experts.md, which benchmarks/experts.py --page writes.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from gemma4_jax.configs import base
from gemma4_jax.counts import count_active_parameters
from gemma4_jax.data.charts import STYLE, line_chart
from gemma4_jax.run_config import RunConfig
from gemma4_jax.train.loop import train

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = Path(__file__).with_suffix(".json")

MLP_DIM, CHOSEN, EXPERTS, EXPERT_DIM = 256, 2, 16, 128
NAMES = "experts", "dense"
WARMUP = 100
MEAN_OF = 25
PAGE = "svg{background:#fff;color:#111}@media(prefers-color-scheme:dark){svg{background:#12151b;color:#e4e8f0}}"
"""Of a picture that stands on no page of ours."""


def make_config(run_dir: Path, steps: int, *, has_experts: bool) -> RunConfig:
    """Of the run of one of the two."""
    config = base.get_config()
    text = config.model.text
    text.embed_dim, text.num_layers, text.num_kv_shared_layers, text.uses_double_wide_mlp = 128, 4, 0, False
    text.head_dim = text.global_head_dim = 32
    text.mlp_dim = MLP_DIM if has_experts else MLP_DIM + CHOSEN * EXPERT_DIM
    sizes = (EXPERTS, CHOSEN, EXPERT_DIM) if has_experts else (0, 0, 0)
    text.num_experts, text.num_experts_per_token, text.expert_dim = sizes
    config.name, config.run_dir = run_dir.name, str(run_dir)
    config.data.sources.digits.weight, config.data.sources.python.weight = 0.0, 1.0
    config.data.seq_len, config.data.batch_size, config.data.images_per_row = 512, 4, 0
    config.train.num_steps, config.train.loss_chunk = steps, 512
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, min(WARMUP, steps - 1)
    config.checkpoint.every_steps = config.evaluators.eval.every_steps = steps
    config.evaluators.eval.num_documents = 64
    config.log.every_steps, config.log.tensorboard, config.export.at_end = 1, False, False
    return RunConfig.from_dict(config.to_dict())


def run(folder: Path, steps: int, name: str) -> dict[str, Any]:
    """Losses, loads and size of one of the two."""
    config = make_config(folder / name, steps, has_experts=name == "experts")
    summary = train(config)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    records = [record for line in lines if "loss" in (record := json.loads(line))]
    return {
        "active": count_active_parameters(config.model),
        "eval_loss": summary["eval_loss"],
        "seconds": summary["wall_seconds"],
        "tokens": sum(record["tokens"] for record in records),
        "loss": [record["loss"] for record in records],
        "load": [[max(layer) * len(layer) for layer in record.get("expert_load", ())] for record in records],
    }


def draw(name: str, chart: str) -> None:
    """A chart as a picture of its own."""
    beginning, _, rest = chart.partition(">")
    picture = f'{beginning} xmlns="http://www.w3.org/2000/svg"><style>{PAGE}{STYLE}</style>{rest}'
    (DOCS / name).write_text(picture + "\n")


SECTION = """
## Learning, beside a dense model

Written by `benchmarks/moe_curves.py`. Two models trained from scratch on the same {tokens:,} tokens of the Python
sources that ship with the package, D 128, 4 layers, {steps:,} steps. One has an MLP of {mlp} and chooses {chosen} of
{experts} experts of width {width}, with the balance loss that is the default from scratch; the other has an MLP as wide
as the first and the chosen experts together.

| | active parameters | loss of the last 50 steps | held-out loss |
| --- | ---: | ---: | ---: |
{rows}

With experts the last losses are {difference:.3f} {sign}. Each expert sees an eighth of the tokens, in the beginning too
few for it to help. The load of the fullest expert of all layers over the mean, behind the warm-up of {warmup}
steps: {mean:.2f} on average, above 2 in {above:.1%} of the steps, which have 2,048 tokens each, and at most
{largest:.2f}; {late:.2f} on average over the last 50.

![Training loss of both](experts_loss.svg)

![Training loss with experts less that of the dense model, the mean of {mean_of} steps](experts_gain.svg)

![Load of the fullest expert of each layer over the mean](experts_load.svg)
"""


def section() -> str:
    """What docs/experts.md says of it."""
    found = json.loads(FIGURES.read_text())
    loads = [max(load) for load in found["experts"]["load"]]
    last = {name: sum(one["loss"][-50:]) / 50 for name, one in found.items()}
    rows = (
        f"| {name} | {one['active']:,} | {last[name]:.3f} | {one['eval_loss']:.3f} |" for name, one in found.items()
    )
    return SECTION.format(
        tokens=found["experts"]["tokens"],
        steps=len(loads),
        mlp=MLP_DIM,
        chosen=CHOSEN,
        experts=EXPERTS,
        width=EXPERT_DIM,
        rows="\n".join(rows),
        difference=abs(last["experts"] - last["dense"]),
        sign="lower" if last["experts"] < last["dense"] else "higher",
        warmup=WARMUP,
        mean_of=MEAN_OF,
        mean=sum(loads[WARMUP:]) / len(loads[WARMUP:]),
        above=sum(load > 2 for load in loads[WARMUP:]) / len(loads[WARMUP:]),
        largest=max(loads[WARMUP:]),
        late=sum(loads[-50:]) / 50,
    )


def main() -> None:
    """Trains both, draws, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        found = {name: run(Path(folder), steps, name) for name in NAMES}
    FIGURES.write_text(json.dumps(found) + "\n")
    losses = {name: list(enumerate(one["loss"], 1)) for name, one in found.items()}
    draw("experts_loss.svg", line_chart("Training loss", losses, y="nats per token"))
    less = [with_experts - dense for with_experts, dense in zip(*(found[name]["loss"] for name in NAMES), strict=True)]
    means = [(i + MEAN_OF / 2, sum(less[i : i + MEAN_OF]) / MEAN_OF) for i in range(0, len(less), MEAN_OF)]
    draw("experts_gain.svg", line_chart("Experts less dense", {"": means}, y="nats per token", includes=(0,)))
    loads = enumerate(zip(*found["experts"]["load"], strict=True))
    lines = {f"layer {layer}": list(enumerate(load, 1)) for layer, load in loads}
    draw("experts_load.svg", line_chart("Load of the fullest expert over the mean", lines, includes=(1,)))
    print(section())


if __name__ == "__main__":
    main()
