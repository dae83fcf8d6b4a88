import json
from pathlib import Path

import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.launch.run_config import model_config
from gemma4_jax.train.loop import train

SUMMARY = [
    "steps", "eval_loss", "eval_exact_match", "eval_exact_match_blank_images", "tokens_per_second",
    "images_per_second", "step_seconds_median", "compile_seconds", "data_wait_share", "packing_efficiency",
    "peak_rss_bytes", "wall_seconds",
]  # fmt: skip


@pytest.fixture
def short_config(shallow_config):
    shallow_config.mesh.data, shallow_config.mesh.fsdp = -1, 1
    shallow_config.train.num_steps, shallow_config.log.every_steps = 5, 2
    shallow_config.checkpoint.every_steps, shallow_config.checkpoint.keep = 2, 2
    shallow_config.eval.every_steps, shallow_config.eval.num_documents = 3, 8
    return shallow_config


def records_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_everything_and_a_finished_one_is_left_alone(short_config, capsys):
    summary = train(short_config, model_config(short_config))
    run_dir = Path(short_config.run_dir)
    assert set(SUMMARY) <= set(summary)
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["steps"] == 5
    assert 0 < summary["packing_efficiency"] <= 1
    assert summary["data"]["documents"] > 0
    records = records_of(run_dir)
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 5]
    assert [r["step"] for r in records if "eval_loss" in r] == [3, 5]
    assert records[-1]["eval_loss"] == summary["eval_loss"]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["4", "5"]
    page = (run_dir / "report.html").read_text()
    assert page.count("<figure") == 8

    before = (run_dir / "metrics.jsonl").read_bytes()
    assert train(short_config, model_config(short_config)) == summary
    assert "nothing left to do" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_bytes() == before

    short_config.train.num_steps = 6
    assert train(short_config, model_config(short_config))["steps"] == 6
    assert [r["step"] for r in records_of(run_dir) if "loss" in r] == [2, 4, 5, 6]


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(short_config):
    short_config.optimizer.learning_rate, short_config.optimizer.warmup_steps = 1e18, 0
    short_config.checkpoint.every_steps = 1
    with pytest.raises(InputError, match=r"not a number at step \d+.*less than optimizer.learning_rate=1e\+18"):
        train(short_config, model_config(short_config))
    run_dir = Path(short_config.run_dir)
    stopped_at = records_of(run_dir)[-1]["step"]
    kept = [int(path.name) for path in (run_dir / "checkpoints").iterdir()]
    assert kept
    assert max(kept) < stopped_at
    assert not (run_dir / "summary.json").exists()


@pytest.mark.slow
def test_text_alone(short_config):
    short_config.data.mixture = {"python": 1.0}
    short_config.data.images_per_row, short_config.optimizer.learning_rate_scale.vision = 0, 0.0
    summary = train(short_config, model_config(short_config))
    assert summary["eval_exact_match"] is None
    assert summary["eval_loss"] > 0
    assert records_of(Path(short_config.run_dir))[0]["images"] == 0
