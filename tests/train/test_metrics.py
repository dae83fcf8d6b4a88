import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.train.metrics import MEASURED, Meter, MetricsLog, read_records
from gemma4_jax.train.step import StepMetrics


def step_metrics(loss: float, *, is_sane: bool = True) -> StepMetrics:
    values = {"grad_norm": 2.0, "param_norm": 3.0, "learning_rate": 0.1}
    return StepMetrics(
        means={"loss": jnp.float32(loss), "expert_load": jnp.array([[0.25, 0.75]])},
        **{name: jnp.float32(value) for name, value in values.items()},
        tokens=jnp.int32(60),
        images=jnp.int32(3),
        is_sane=jnp.array(is_sane),
    )


def test_meter_gathers_steps_into_records():
    meter = Meter(every_steps=2, last_step=5, slots=80)
    records = []
    for step in range(1, 6):
        records += meter.add(step, step_metrics(float(step)), data_wait=0.5)
    assert len(records) == 2  # the last step is still at work
    records += meter.drain()
    assert [(r["step"], r["steps"], r["loss"]) for r in records] == [(2, 2, 1.5), (4, 2, 3.5), (5, 1, 5.0)]
    first = records[0]
    assert (first["tokens"], first["images"], first["padding_share"]) == (120, 6, 0.25)
    assert first["data_wait_seconds"] == 1.0
    assert first["expert_load"] == [[0.25, 0.75]]
    np.testing.assert_allclose(first["tokens_per_second"], 120 / first["seconds"])


def test_what_is_flushed_is_a_record_of_fewer_steps():
    meter = Meter(every_steps=4, last_step=100, slots=80)
    for step in range(1, 8):
        meter.add(step, step_metrics(float(step)), data_wait=0.0)
    assert [(r["step"], r["steps"], r["loss"]) for r in meter.flush()] == [(7, 3, 6.0)]
    assert meter.flush() == []


def test_a_step_that_is_not_sane_is_told_at_once():
    meter = Meter(every_steps=100, last_step=1000, slots=80)
    meter.add(1, step_metrics(1.0), data_wait=0.0)
    meter.add(2, step_metrics(float("nan"), is_sane=False), data_wait=0.0)
    (record,) = meter.drain()
    assert record["step"] == 2
    assert np.isnan(record["loss"])
    assert not record["is_sane"]


def test_log_is_one_line_per_step_across_a_crash(tmp_path: Path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        log.write(dict.fromkeys(MEASURED, 1) | {"step": step, "loss": 1.0 / step})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
    log = MetricsLog(tmp_path, 3, tensorboard=False)
    log.write(dict.fromkeys(MEASURED, 1) | {"step": 4, "loss": float("nan"), "expert_load": [[float("nan")] * 2]})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert read_records(path)[-1]["loss"] is read_records(path)[-1]["expert_load"] is None
    log.close()


def test_tensorboard_files(tmp_path: Path):
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write({"step": 1, "steps": 1, "loss": 1.5, "expert_load": [[0.5, 0.5]]})
    log.write({"step": 1, "eval_loss": 2.5}, group="eval")
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for tag in (b"train/loss", b"train/expert_load_max", b"eval/loss"):
        assert tag in content


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "it is not an object"),
        (b'{"loss": 1.0}', "step is not a whole number"),
        (b'{"step": "3", "eval_loss": 1.0}', "step is not a whole number"),
        (b'{"step": 3, "eval_loss": "low"}', "eval_loss is 'low'"),
        (b'{"step": 3, "loss": 1.0, "steps": 1}', "tokens is missing"),
        (b'{"step": 3, "loss": 1.0, "expert_load": 4}', "expert_load is 4"),
    ],
)
def test_a_line_that_is_no_record_is_named(line: bytes, fault: str, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "eval_loss": 1.0}\n' + line + b"\n")
    with pytest.raises(InputError, match=re.escape(f"{path} line 2 is not a record of a run ({fault})")):
        read_records(path)
