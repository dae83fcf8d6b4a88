import dataclasses
import errno
import itertools
import json
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from gemma4_jax import processes
from gemma4_jax.data.documents import open_documents
from gemma4_jax.errors import InputError
from gemma4_jax.hf.save import export_state
from gemma4_jax.sharding import make_mesh
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train import loop
from gemma4_jax.train.checkpoint import Checkpoints
from gemma4_jax.train.evaluators.answers import Answers
from gemma4_jax.train.initialize import initial_values
from gemma4_jax.train.loop import train
from gemma4_jax.train.program import make_program
from gemma4_jax.train.state import TrainState, create_state
from tests.train.tiny import typed

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
    shallow_config.evaluators.eval.every_steps, shallow_config.evaluators.eval.num_documents = 3, 8
    return shallow_config


def records_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_everything_and_a_finished_one_is_left_alone(short_config, capsys, monkeypatch):
    events, save, measure = [], Checkpoints.save, Answers.measure
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: events.append(step) or save(self, step, *rest))
    monkeypatch.setattr(Answers, "measure", lambda *args, **kw: events.append("measure") or measure(*args, **kw))
    summary = train(typed(short_config))
    # What is due at the same step is saved first. The last evaluation is that of blank images.
    assert events == [2, "measure", 4, 5, "measure", "measure"]
    said = [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines() if not line.startswith("step")]
    stages = ["opened the data", "made the parameters", "compiled the training step", "compiled the evaluation"]
    assert said[1:8:2] == stages
    assert all(line.endswith(" ...") for line in said[0:8:2])
    run_dir = Path(short_config.run_dir)
    assert set(SUMMARY) <= set(summary)
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["steps"] == 5
    assert 0 < summary["packing_efficiency"] <= 1
    assert summary["data"]["digits"]["documents"] > 0
    records = records_of(run_dir)
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 5]
    assert [r["step"] for r in records if "eval_loss" in r] == [3, 5]
    assert records[-1]["eval_loss"] == summary["eval_loss"]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["4", "5"]
    page = (run_dir / "report.html").read_text()
    assert page.count("<figure") == 8

    before = (run_dir / "metrics.jsonl").read_bytes()
    assert train(typed(short_config)) == summary
    assert "nothing left to do" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_bytes() == before

    short_config.train.num_steps = 6
    assert train(typed(short_config))["steps"] == 6
    assert [r["step"] for r in records_of(run_dir) if "loss" in r] == [2, 4, 5, 6]


@pytest.mark.slow
def test_a_run_ends_with_its_data_as_at_its_last_step(short_config, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}" + " and more" * (i % 12)}) + "\n" for i in range(300)))
    with short_config.unlocked():
        short_config.data.sources = {"mine": {"path": str(path), "epochs": 2, "at_end": "stop", "held_out": 0.2}}
    short_config.train.num_steps, short_config.train.grad_accum_steps, short_config.data.batch_size = 100, 2, 16
    short_config.log.every_steps = short_config.checkpoint.every_steps = short_config.evaluators.eval.every_steps = 1000
    summary = train(typed(short_config))
    last = summary["steps"]
    assert 2 < last < 100
    assert summary["data_ended"] is True
    assert summary["data"]["mine"]["documents"] == 2 * len(open_documents(typed(short_config).data.sources["mine"]))
    ends = "the data ends, as at_end='stop' of data.sources.mine says"
    assert f"step {last} of 100 was the last: {ends}" in capsys.readouterr().out
    run_dir = Path(short_config.run_dir)
    records = records_of(run_dir)
    assert [(r["step"], "eval_loss" in r) for r in records] == [(last, False), (last, True)]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [str(last)]

    assert train(typed(short_config)) == summary
    assert "nothing left to do" in capsys.readouterr().out
    (run_dir / "summary.json").unlink()  # as if it had been killed before it was written
    again = train(typed(short_config))
    assert all(again[name] == summary[name] for name in ("steps", "data_ended", "data", "eval_loss"))
    assert records_of(run_dir) == records


@pytest.mark.parametrize("failing", ["read_records", "write_report", "write_summary"])
def test_other_processes_are_told_that_the_first_cannot_finish(failing, tmp_path, monkeypatch):
    """They wait for it, and would otherwise do so until it is taken for dead."""
    told = []
    monkeypatch.setattr(processes, "wait_for_first", lambda *, is_well=True: told.append(is_well))
    for name in ("read_records", "write_report", "write_summary", "summarize"):
        monkeypatch.setattr(loop, name, mock.Mock(return_value={}))
    monkeypatch.setattr(loop, failing, mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    run = mock.MagicMock(evaluators={}, run_dir=tmp_path, state=TrainState(0, nnx.State({}), nnx.State({}), ()))
    run.step, run.config.train.num_steps = 1, 1
    with pytest.raises(OSError, match="No space left"):
        loop._Run.finish(run, started=0.0)
    assert told[-1] is False


def lose_loss(run, batch):
    return dataclasses.replace(batch, loss_weights=batch.loss_weights * np.float32(np.nan))


def shrink_parameters(run, batch):
    """What is added to them, of the size of the learning rate, then leaves nothing of them."""
    params = jax.tree.map(lambda x: x * np.float32(1e-12), run.state.trained)
    run.state = dataclasses.replace(run.state, trained=params)
    return batch


def spoil_router(run, batch):
    kernel = run.state.trained["decoder"]["own"]["layers"][1]["moe"]["router"]["kernel"]
    kernel.set_value(kernel.get_value().at[0, 2, 1].set(np.nan))
    return batch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lose_loss, "the loss or its gradient is not a number at step 3"),
        (spoil_router, "the loss or its gradient is not a number, first in the router of layer 1, at step 3"),
        (shrink_parameters, "the update is larger than float32 can add to the parameters at step 3"),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(break_it, says, short_config, monkeypatch):
    steps, next_batch = itertools.count(1), loop._Run._next_batch

    def break_third(run):
        batch, data_wait = next_batch(run)
        return (break_it(run, batch) if next(steps) == 3 else batch), data_wait

    monkeypatch.setattr(loop._Run, "_next_batch", break_third)
    short_config.checkpoint.every_steps = short_config.checkpoint.keep = 1
    short_config.evaluators.eval.num_documents = 2
    advice = ".* less than optimizer.learning_rate=0.003, perhaps from the checkpoint of step 2 of this one"
    with pytest.raises(InputError, match=says + advice):
        train(typed(short_config))
    run_dir = Path(short_config.run_dir)
    assert records_of(run_dir)[-1]["step"] == 3
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["2"]
    assert not (run_dir / "summary.json").exists()
    assert not (run_dir / "lock").exists()


@pytest.mark.slow
def test_what_begins_broken_blames_what_it_begins_from(short_config, tmp_path):
    model = typed(short_config).model
    mesh = make_mesh(short_config.mesh.to_dict())
    program = make_program(typed(short_config), mesh)
    state = create_state(program.state, program.config)
    table = state.trained["embedder"]["table"]
    table.set_value(table.get_value().at[3, 4].set(np.nan))
    export_state(state.model, model, tmp_path / "hf", tokenizer=Tokenizer.load("bundled"), max_soft_tokens=70)
    short_config.init.from_hf = str(tmp_path / "hf")
    named = (
        r"from_hf='.*hf' holds values that are infinite or not numbers, in model.language_model.embed_tokens.weight:"
    )
    with pytest.raises(InputError, match=named):
        initial_values(typed(short_config), program.state, tmp_path)


@pytest.mark.slow
def test_text_alone(short_config):
    short_config.data.sources.digits.weight = 0.0
    short_config.data.images_per_row = 0
    summary = train(typed(short_config))
    assert "eval_exact_match" not in summary
    assert summary["eval_loss"] > 0
    assert records_of(Path(short_config.run_dir))[0]["images"] == 0


def test_an_expert_that_starves_is_named_once_and_not_in_the_warmup(shallow_config):
    said = []
    run = types.SimpleNamespace(
        config=typed(shallow_config), starving=set(), terminal=types.SimpleNamespace(say=said.append)
    )
    load = [[0.25, 0.25, 0.25, 0.25], [0.01, 0.49, 0.25, 0.25]]
    for step in (shallow_config.optimizer.warmup_steps, 10, 11):
        loop._Run._warn_of_starving_experts(run, {"step": step, "expert_load": load})
    loop._Run._warn_of_starving_experts(run, {"step": 12, "expert_load": [[0.01, 0.33, 0.33, 0.33], load[1]]})
    assert said == [
        "expert 0 of layer 1 starves at step 10: 4.0% of an even share of the tokens",
        "expert 0 of layer 0 starves at step 12: 4.0% of an even share of the tokens",
    ]


def test_a_run_that_is_ended_while_it_starts_says_where_it_goes_on(short_config, monkeypatch):
    """Before it has read the checkpoint: opening the data may take minutes."""
    (Path(short_config.run_dir) / "checkpoints" / "7").mkdir(parents=True)
    known, leave = [], loop.Interruption.__exit__
    monkeypatch.setattr(
        loop.Interruption, "__exit__", lambda self, *error: known.append(self.saved_step) or leave(self, *error)
    )
    monkeypatch.setattr(loop, "make_program", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(typed(short_config))
    assert known == [7]
