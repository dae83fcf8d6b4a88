"""`train`: a whole run, from its config to its report, and on from wherever it was stopped."""

import contextlib
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
from flax import nnx
from jax.sharding import Mesh

from gemma4_jax.batch import Batch
from gemma4_jax.config import Gemma4Config
from gemma4_jax.data.iterator import read_counters
from gemma4_jax.data.pipeline import EvalItem, eval_batches, make_train_iterator
from gemma4_jax.data.tally import left_out_sentences
from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path
from gemma4_jax.sharding import BATCH_AXES, batch_sharding, make_mesh
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.checkpoint import Checkpoints
from gemma4_jax.train.evaluate import Reading, evaluate, put_batch, read_greedily
from gemma4_jax.train.fingerprints import check_data
from gemma4_jax.train.initialize import initial_values
from gemma4_jax.train.interruption import Interruption
from gemma4_jax.train.lock import RunLock
from gemma4_jax.train.metrics import Meter, MetricsLog, read_records
from gemma4_jax.train.program import Program, compile_step, make_program
from gemma4_jax.train.report import summarize, write_report, write_summary
from gemma4_jax.train.run_dir import open_run_dir, run_tokenizer
from gemma4_jax.train.state import create_state
from gemma4_jax.train.terminal import Terminal

NUM_SAMPLES = 24
"""Held-out images that the report shows."""


HeldOut = Sequence[tuple[Batch, list[EvalItem]]]
"""What `data.pipeline.eval_batches` gives."""


def train(config: Any, model_config: Gemma4Config) -> dict[str, Any]:
    """Trains, evaluates and reports a run; goes on from the last checkpoint where its run directory holds one.

    On SIGTERM and Ctrl-C the run saves a checkpoint and leaves by SystemExit(143 or 130); see `interruption`.

    Args:
      config: the checked run config.
      model_config: the architecture that its section `model` describes.
    Returns:
      What summary.json holds.
    Raises:
      InputError: the run directory, the devices or the data are not acceptable, or the loss is no longer a number.
    """
    started = time.perf_counter()
    mesh = make_mesh(config.mesh.to_dict())
    _check_processes(mesh)
    with contextlib.ExitStack() as stack:
        terminal = stack.enter_context(Terminal(is_shown=jax.process_index() == 0))
        lock = RunLock(local_path(config.run_dir).absolute(), terminal.say)
        interruption = stack.enter_context(Interruption(terminal.say, terminal.stop, lock.release))
        tokenizer = run_tokenizer(config)
        with terminal.stage("opening the data", "opened the data"):
            iterator = make_train_iterator(
                config, model_config, tokenizer, process_index=jax.process_index(), process_count=jax.process_count()
            )
            stack.callback(iterator.close)
            held_out = eval_batches(config, model_config, tokenizer, config.eval.batch_size)
        program = make_program(config, model_config, mesh)
        # Only now: a run that cannot begin leaves no config behind that the next one would have to be like.
        stack.enter_context(lock)
        run_dir = open_run_dir(config, tokenizer)
        checkpoints = Checkpoints(run_dir, config.checkpoint.keep, checksums=config.checkpoint.checksums)
        stack.callback(checkpoints.close)
        if (summary := _summary_of_finished(run_dir, checkpoints.latest_step, config.train.num_steps)) is not None:
            terminal.say(f"{run_dir} holds the finished run: there is nothing left to do.")
            return summary
        is_resumed, may_change = checkpoints.latest_step is not None, config.data.allow_changes
        changes = check_data(run_dir, iterator.fingerprints, is_resumed=is_resumed, allow_changes=may_change)
        for change in changes:
            terminal.say(f"goes on although the data has changed: {change}")
        with jax.set_mesh(mesh):
            run = _Run(
                config,
                model_config,
                program,
                run_dir,
                iterator,
                held_out,
                checkpoints,
                terminal,
                interruption,
                lock,
            )
            run.train()
            return run.finish(tokenizer, started)


class _Run:
    """One start of a run: what it works on, and everything that watches it."""

    def __init__(
        self,
        config: Any,
        model_config: Gemma4Config,
        program: Program,
        run_dir: Path,
        iterator: grain.DatasetIterator,
        held_out: HeldOut,
        checkpoints: Checkpoints,
        terminal: Terminal,
        interruption: Interruption,
        lock: RunLock,
    ) -> None:
        self.config, self.program, self.mesh, self.run_dir = config, program, program.mesh, run_dir
        self.iterator, self.held_out, self.checkpoints = iterator, held_out, checkpoints
        self.terminal, self.interruption, self.lock = terminal, interruption, lock
        self.num_steps = config.train.num_steps
        abstract = program.state
        latest = interruption.saved_step = checkpoints.latest_step
        if latest is None:
            with terminal.stage("making the parameters", "made the parameters"):
                values = initial_values(config.init, model_config, abstract, run_dir)
                state = create_state(abstract, model_config, program.config, values)
                self.step, self.state = 0, jax.block_until_ready(state)
        else:
            with terminal.stage(f"reading the checkpoint of step {latest}"):
                self.step, self.state = latest, checkpoints.restore(latest, abstract, iterator)
            terminal.say(f"resumed from the checkpoint of step {latest}")
        self.meter = Meter(config.log.every_steps, self.num_steps, config.data.batch_size * config.data.seq_len)
        is_first = jax.process_index() == 0
        self.log = MetricsLog(run_dir, self.step, tensorboard=config.log.tensorboard) if is_first else None
        self.evaluation: dict[str, Any] | None = None
        self.compile_seconds = 0.0
        self.saving: int | None = None  # the step that is being written

    def train(self) -> None:
        """Takes the steps that are left."""
        if self.step and self._is_due(self.config.eval.every_steps) and self.held_out and not self._is_evaluated():
            self._evaluate()  # it left without that
        train_step = None
        while self.step < self.num_steps:
            batch, data_wait = self._next_batch()
            if train_step is None:
                train_step, data_wait = self._compile(), 0.0
            self.state, metrics = train_step(self.state, batch)
            # The last checkpoint is written while the run evaluates and takes this step. Before the step is told it is
            # whole: so a run that is killed, at any moment, repeats no more steps than lie between two checkpoints.
            self._wait_for_save()
            self.step += 1
            self.interruption.has_unsaved = True
            self._tell(self.meter.add(self.step, metrics, data_wait))
            if self.interruption.is_due(self.step):
                self._leave()
            # First of all, for an evaluation takes long.
            if self._is_due(self.config.checkpoint.every_steps):
                self._save()
            if self._is_due(self.config.eval.every_steps) and self.held_out:
                self._evaluate()
        self._wait_for_save()

    def finish(self, tokenizer: Tokenizer, started: float) -> dict[str, Any]:
        """Writes summary.json and report.html.

        Args:
          tokenizer: decodes sample readings.
          started: time.perf_counter() when the run was started.
        Returns:
          The summary.
        """
        if self.evaluation is None and self.held_out:
            self.evaluation = evaluate(self._forward, self.held_out, self.mesh)
        with self.terminal.stage("reading sample images for the report"):
            blank = evaluate(self._forward, self.held_out, self.mesh, are_images_blank=True) if self.held_out else {}
            readings = self._read_samples()
        records = read_records(self.run_dir / "metrics.jsonl")
        summary = {
            "steps": self.step,
            "eval_loss": (self.evaluation or {}).get("loss"),
            "eval_exact_match": (self.evaluation or {}).get("exact_match"),
            "eval_exact_match_blank_images": blank.get("exact_match"),
            **summarize(records),
            "compile_seconds": self.compile_seconds,
            "peak_rss_bytes": _peak_rss_bytes(),
            "wall_seconds": time.perf_counter() - started,
            "eval_images": sum(len(items) for _, items in self.held_out),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(self.state.model, nnx.Param))),
            "data": read_counters(self.iterator),
        }
        if self.log is not None:
            self.log.close()
            # The report first: a summary says that the run is finished.
            write_report(self.run_dir, self.config.name, summary, records, readings, tokenizer)
            write_summary(self.run_dir, summary)
            for sentence in left_out_sentences(summary["data"]):
                self.terminal.say(sentence)
            self.terminal.say(f"report: {self.run_dir / 'report.html'}")
        return summary

    def _next_batch(self) -> tuple[Batch, float]:
        """The next global batch, and how long the devices stood idle waiting for it.

        While the devices are at work, waiting costs nothing. If they were done by the time that the batch came, all
        of the waiting counts: a little too much, never too little.
        """
        asked = time.perf_counter()
        local = next(self.iterator)
        data_wait = time.perf_counter() - asked if self.meter.is_idle() else 0.0
        put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(self.mesh))
        return jax.tree.map(put, local), data_wait

    def _compile(self) -> Any:
        """Compiles all that the run will need, so that it cannot fail for want of it later, with steps to lose."""
        began = time.perf_counter()
        with self.terminal.stage("compiling the training step", "compiled the training step"):
            step = compile_step(self.program, self.config.data.batch_size)
        self.compile_seconds = time.perf_counter() - began
        if self.held_out:
            _ = self._eval_step
        else:
            self.terminal.say("nothing is evaluated: no source of data.mixture holds documents back; see eval.source")
        self.meter.restart()
        return step

    @functools.cached_property
    def _eval_step(self) -> Any:
        batch = put_batch(self.held_out[0][0], self.mesh)
        with self.terminal.stage("compiling the evaluation", "compiled the evaluation"):
            return self.program.eval_step.lower(self.state.trained, self.state.frozen, batch).compile()

    def _is_due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.num_steps

    def _tell(self, records: Sequence[dict[str, Any]]) -> None:
        """Logs training records; stops the run at one whose step was not sane."""
        for record in records:
            is_sane = record.pop("is_sane")
            if self.log is not None:
                self.log.write(record)
            self.terminal.show(record, self.num_steps)
            if not is_sane:
                raise self._not_sane(record)

    def _not_sane(self, record: dict[str, Any]) -> InputError:
        step, rate = record["step"], self.config.optimizer.learning_rate
        if not math.isfinite(record["loss"]) and step == 1:
            return InputError(
                "the loss is not a number before anything was trained: begin from other parameters (init), or give "
                f"more than train.compute_dtype={self.config.train.compute_dtype!r}, such as 'float32'."
            )
        is_number = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
        what = (
            "update is larger than float32 can add to the parameters"
            if is_number
            else "loss or its gradient is not a number"
        )
        saved = self.checkpoints.latest_step
        from_there = (
            ""
            if saved is None
            else (f", perhaps from the checkpoint of step {saved} of this one (init.from_run={str(self.run_dir)!r})")
        )
        return InputError(
            f"the {what} at step {step} and the run was stopped: begin another run_dir with less than "
            f"optimizer.learning_rate={rate}{from_there}."
        )

    def _is_evaluated(self) -> bool:
        records = read_records(self.run_dir / "metrics.jsonl")
        return any(record["step"] == self.step and "eval_loss" in record for record in records)

    def _evaluate(self) -> None:
        self._tell(self.meter.drain())
        with self.terminal.stage(f"evaluating step {self.step}"):
            self.evaluation = evaluate(self._forward, self.held_out, self.mesh)
        loss, exact_match = self.evaluation["loss"], self.evaluation["exact_match"]
        if self.log is not None:
            self.log.write({"step": self.step, "eval_loss": loss, "eval_exact_match": exact_match})
        share = "" if exact_match is None else f", {exact_match:.1%} of images read exactly"
        self.terminal.say(f"step {self.step}: held-out loss {loss:.4f}{share}")
        self.meter.restart()

    def _save(self) -> None:
        # A step that was not sane must not become a checkpoint: telling it stops the run first.
        self._tell(self.meter.drain())
        self.lock.check()
        self.checkpoints.save(self.step, self.state, self.iterator)
        self.saving = self.step
        self.meter.restart()

    def _wait_for_save(self) -> None:
        if self.saving is not None:
            self.checkpoints.wait()
            self.interruption.saved_step, self.saving = self.saving, None
            self.interruption.has_unsaved = self.interruption.saved_step != self.step

    def _leave(self) -> None:
        """Saves at once, for whoever sent the signal gives little time, and ends the process."""
        self._tell(self.meter.flush())
        if self.step not in (self.saving, self.interruption.saved_step):
            self._save()
        self._wait_for_save()
        self.interruption.leave()

    def _forward(self, batch: Batch) -> Any:
        if self.interruption.signal is not None:
            self._leave()
        return self._eval_step(self.state.trained, self.state.frozen, batch)

    def _read_samples(self) -> list[Reading]:
        readings: list[Reading] = []
        for batch, items in self.held_out:
            if items and len(readings) < NUM_SAMPLES:
                readings += read_greedily(self._forward, batch, items, self.mesh)
        return readings[:NUM_SAMPLES]


def _check_processes(mesh: Mesh) -> None:
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if shards % jax.process_count():
        raise InputError(
            f"mesh spreads the rows of a batch over {shards} devices (data, fsdp and expert): "
            f"it must be a multiple of the {jax.process_count()} processes, each of which reads its own rows."
        )


def _summary_of_finished(run_dir: Path, latest_step: int | None, num_steps: int) -> dict[str, Any] | None:
    path = run_dir / "summary.json"
    if latest_step is None or latest_step < num_steps or not path.exists():
        return None
    try:
        summary = json.loads(path.read_text("utf-8"))
        return summary if summary["steps"] == latest_step else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as the summary of a run: remove it, and the same command writes it again."
        ) from error


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
