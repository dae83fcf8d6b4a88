"""`train`: a whole run, from its config to its report, and on from wherever it was stopped."""

import contextlib
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from gemma4_jax import processes
from gemma4_jax.batch import Batch
from gemma4_jax.checkpoints.integrity import checkpoint_steps
from gemma4_jax.data.iterator import TrainIterator, add_counters, read_counters
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.data.tally import left_out_sentences
from gemma4_jax.errors import InputError
from gemma4_jax.files import local_path
from gemma4_jax.run_config import RunConfig
from gemma4_jax.sharding import batch_sharding, make_mesh
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.checkpoint import Checkpoints
from gemma4_jax.train.evaluators import Evaluator, Setting, make_evaluator
from gemma4_jax.train.fingerprints import check_data
from gemma4_jax.train.initialize import initial_values
from gemma4_jax.train.interruption import Interruption
from gemma4_jax.train.lock import RunLock
from gemma4_jax.train.metrics import Meter, MetricsLog, read_records
from gemma4_jax.train.profiler import Profiler
from gemma4_jax.train.program import Program, batch_part, compile_step, make_program
from gemma4_jax.train.report import summarize, write_report, write_summary
from gemma4_jax.train.run_dir import open_run_dir, run_tokenizer
from gemma4_jax.train.state import create_state
from gemma4_jax.train.terminal import Terminal


def train(config: RunConfig) -> dict[str, Any]:
    """Trains, evaluates and reports a run; goes on from the last checkpoint where its run directory holds one.

    On SIGTERM and Ctrl-C the run saves a checkpoint and leaves by SystemExit(143 or 130); see `interruption`.

    Args:
      config: of the run.
    Returns:
      What summary.json holds.
    Raises:
      InputError: the run directory, the devices or the data are not acceptable, or the loss is no longer a number.
    """
    started = time.perf_counter()
    mesh = make_mesh(vars(config.mesh))
    part, num_parts = batch_part(mesh)
    with contextlib.ExitStack() as stack:
        terminal = stack.enter_context(Terminal(is_shown=processes.is_first()))
        run_dir = local_path(config.run_dir).absolute()
        lock = RunLock(run_dir, terminal.say)
        interruption = stack.enter_context(Interruption(terminal.say, terminal.stop, lock.release))
        interruption.saved_step = max(checkpoint_steps(run_dir), default=None)  # until it is known which is intact
        program = make_program(config, mesh)
        tokenizer = run_tokenizer(config)
        with terminal.stage("opening the data", "opened the data"):
            iterator = make_train_iterator(program.config, tokenizer, process_index=part, process_count=num_parts)
            stack.callback(iterator.close)
            run = _Run(program, tokenizer, iterator, terminal, interruption, lock)
        # Only now: a run that cannot begin leaves no config behind that the next one would have to be like.
        stack.enter_context(lock)
        run_dir = open_run_dir(config, tokenizer)
        checkpoints = Checkpoints(run_dir, config.checkpoint.keep, checksums=config.checkpoint.checksums)
        stack.callback(checkpoints.close)
        latest = checkpoints.latest_step
        summary = processes.agree(lambda: _summary_of_finished(run_dir, latest, config.train.num_steps))
        if summary is not None:
            terminal.say(f"{run_dir} holds the finished run: there is nothing left to do.")
            return summary
        may_change = config.data.allow_changes
        for change in check_data(
            run_dir, iterator.fingerprints, is_resumed=latest is not None, allow_changes=may_change
        ):
            terminal.say(f"goes on although the data has changed: {change}")
        with jax.set_mesh(mesh):
            run.start(run_dir, checkpoints)
            run.train()
            return run.finish(started)


STARVING = 0.05
"""Share of an even load below which an expert is named."""


class Hook(NamedTuple):
    """What a run does after some of its steps: every so many, and after the last."""

    every_steps: int
    call: Callable[[], None]


class _Run:
    """One start of a run: what it works on, and everything that watches it."""

    def __init__(
        self,
        program: Program,
        tokenizer: Tokenizer,
        iterator: TrainIterator,
        terminal: Terminal,
        interruption: Interruption,
        lock: RunLock,
    ) -> None:
        self.program, self.config, self.mesh = program, program.config, program.mesh
        self.tokenizer, self.iterator = tokenizer, iterator
        self.terminal, self.interruption, self.lock = terminal, interruption, lock
        self.num_steps = self.config.train.num_steps
        setting = Setting(program, tokenizer, self._leave_if_asked)
        made = {name: make_evaluator(evaluator, setting) for name, evaluator in self.config.evaluators.items()}
        self.evaluators: dict[str, Evaluator] = {name: evaluator for name, evaluator in made.items() if evaluator}
        self.measured: dict[str, dict[str, float]] = {}
        self.compile_seconds = 0.0
        self.starving: set[tuple[int, int]] = set()
        self.saving: int | None = None  # the step that is being written

    def start(self, run_dir: Path, checkpoints: Checkpoints) -> None:
        """Makes the state of the first step, or reads that of the latest checkpoint."""
        self.run_dir, self.checkpoints = run_dir, checkpoints
        config, abstract, terminal = self.config, self.program.state, self.terminal
        latest = self.interruption.saved_step = checkpoints.latest_step
        if latest is None:
            with terminal.stage("making the parameters", "made the parameters"):
                values = initial_values(config, abstract, run_dir)
                self.step, self.state = 0, jax.block_until_ready(create_state(abstract, config, values))
        else:
            with terminal.stage(f"reading the checkpoint of step {latest}"):
                self.step, self.state = latest, checkpoints.restore(latest, abstract, self.iterator)
            terminal.say(f"resumed from the checkpoint of step {latest}")
        if frozen := sorted({str(path[0]) for path, _ in _parameters(self.state.frozen)}):
            share = _count(self.state.frozen) / _count(self.state.model)
            terminal.say(f"frozen are {share:.1%} of the parameters, in {', '.join(frozen)}")
        self.meter = Meter(config.log.every_steps, self.num_steps, config.data.batch_size * config.data.seq_len)
        with processes.led_by_first():
            is_first = processes.is_first()
            self.log = MetricsLog(run_dir, self.step, tensorboard=config.log.tensorboard) if is_first else None
        self.profiler = Profiler(run_dir / "profile", config.log.profile_step)
        # First of all a checkpoint, for an evaluation takes long.
        self.hooks = [Hook(config.checkpoint.every_steps, self._save)]
        for name in self.evaluators:
            self.hooks.append(Hook(config.evaluators[name].every_steps, functools.partial(self._evaluate, name)))

    def train(self) -> None:
        """Takes the steps that are left."""
        self._make_up_for_evaluations()
        train_step = None
        while self.step < self.num_steps and (found := self._next_batch()) is not None:
            batch, data_wait = found
            if train_step is None:
                train_step, data_wait = self._compile(), 0.0
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.profiler.take(self.step + 1, train_step, self.state, batch)
            # The last checkpoint is written while the run evaluates and takes this step. Before the step is told it is
            # whole: so a run that is killed, at any moment, repeats no more steps than lie between two checkpoints.
            self._wait_for_save()
            self.step += 1
            self.interruption.has_unsaved = True
            self._tell(self.meter.add(self.step, metrics, data_wait))
            if self.interruption.is_due(self.step):
                self._leave()
            for hook in self.hooks:
                if self._is_due(hook.every_steps):
                    hook.call()
        if self.step < self.num_steps:
            self._end_with_data()
        self._wait_for_save()

    def finish(self, started: float) -> dict[str, Any]:
        """Writes summary.json and report.html.

        Args:
          started: time.perf_counter() when the run was started.
        Returns:
          The summary.
        """
        figures: dict[str, float] = {}
        readings = []
        with self.terminal.stage("making the report"):
            for name, evaluator in self.evaluators.items():
                measured = self.measured.get(name) or evaluator.measure(self.state)
                more, shown = evaluator.finish(self.state)
                figures |= _named(name, {**measured, **more})
                readings += shown
        with processes.led_by_first():
            records = read_records(self.run_dir / "metrics.jsonl") if processes.is_first() else []
        summary: dict[str, Any] = {
            "steps": self.step,
            "data_ended": self.step < self.config.train.num_steps,
            **figures,
            **processes.agree(lambda: summarize(records)),
            "compile_seconds": self.compile_seconds,
            "peak_rss_bytes": _peak_rss_bytes(),
            "wall_seconds": time.perf_counter() - started,
            "parameters": _count(self.state.model),
            "data": self._count_documents(),
        }
        with processes.led_by_first():  # which may have no room left on its disk
            if self.log is not None:
                self.log.close()
                # The report first: a summary says that the run is finished.
                write_report(self.run_dir, self.config.name, summary, records, readings, list(self.evaluators))
                write_summary(self.run_dir, summary)
        for sentence in left_out_sentences(summary["data"]):
            self.terminal.say(sentence)
        self.terminal.say(f"report: {self.run_dir / 'report.html'}")
        return summary

    def _count_documents(self) -> dict[str, dict[str, int]]:
        """The counters of each source over all rows of a batch, each of which counts once, whoever else reads it."""
        counted = processes.gather((batch_part(self.mesh)[0], read_counters(self.iterator)))
        return add_counters(dict(counted).values())

    def _next_batch(self) -> tuple[Batch, float] | None:
        """The next global batch, and how long the devices stood idle waiting for it; None where the data has ended.

        While the devices are at work, waiting costs nothing. If they were done by the time that the batch came, all
        of the waiting counts: a little too much, never too little.
        """
        asked = time.perf_counter()
        local = next(self.iterator)
        data_wait = time.perf_counter() - asked if self.meter.is_idle() else 0.0
        if self.config.data.stopping and not any(processes.gather(bool(local.segment_ids.any()))):
            return None  # in every process: one whose rows are at their end goes on with empty ones until then
        put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(self.mesh))
        return jax.tree.map(put, local), data_wait

    def _end_with_data(self) -> None:
        """Does what is due after the last step, which is only now known to have been that."""
        stopping = ", ".join(f"data.sources.{name}" for name in self.config.data.stopping)
        ends = f"the data ends, as at_end='stop' of {stopping} says"
        if not self.step:
            raise InputError(f"{ends}, before the first batch: none of its documents can be used.")
        self._tell(self.meter.flush())
        self.terminal.say(f"step {self.step} of {self.num_steps} was the last: {ends}")
        self.num_steps = self.step
        if self.step not in (self.saving, self.interruption.saved_step):
            self._save()
        self._make_up_for_evaluations()

    def _compile(self) -> Any:
        """Compiles all that the run will need, so that it cannot fail for want of it later, with steps to lose."""
        began = time.perf_counter()
        with self.terminal.stage("compiling the training step", "compiled the training step"):
            step = compile_step(self.program, self.config.data.batch_size)
        self.compile_seconds = time.perf_counter() - began
        if self.evaluators:
            with self.terminal.stage("compiling the evaluation", "compiled the evaluation"):
                for evaluator in self.evaluators.values():
                    evaluator.compile(self.state)
        else:
            self.terminal.say("nothing is evaluated: no source of data.sources holds documents back")
        self.meter.restart()
        return step

    def _is_due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.num_steps

    def _tell(self, records: Sequence[dict[str, Any]]) -> None:
        """Logs training records; stops the run at one whose step was not sane."""
        for record in records:
            is_sane = record.pop("is_sane")
            if self.log is not None:
                self.log.write(record)
            self.terminal.show(record, self.num_steps)
            self._warn_of_starving_experts(record)
            if not is_sane:
                raise self._not_sane(record)

    def _warn_of_starving_experts(self, record: dict[str, Any]) -> None:
        """Names experts that get next to nothing, each once, when the learning rate has been warmed up."""
        if record["step"] <= self.config.optimizer.warmup_steps:
            return
        for layer, load in enumerate(record.get("expert_load", ())):
            for expert, share in enumerate(load):
                if share * len(load) < STARVING and (layer, expert) not in self.starving:
                    self.starving.add((layer, expert))
                    even = f"{share * len(load):.1%} of an even share of the tokens"
                    self.terminal.say(f"expert {expert} of layer {layer} starves at step {record['step']}: {even}")

    def _not_sane(self, record: dict[str, Any]) -> InputError:
        step, rate = record["step"], self.config.optimizer.learning_rate
        loads = enumerate(record.get("expert_load", ()))
        layer = next((layer for layer, load in loads if not math.isfinite(sum(load))), None)
        where = "" if layer is None else f", first in the router of layer {layer},"
        if not math.isfinite(record["loss"]) and step == 1:
            return InputError(
                f"the loss is not a number before anything was trained{where.rstrip(',')}: begin from other parameters "
                f"(init), or give more than train.compute_dtype={self.config.train.compute_dtype!r}, such as 'float32'."
            )
        is_number = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
        what = (
            "update is larger than float32 can add to the parameters"
            if is_number
            else f"loss or its gradient is not a number{where}"
        )
        saved = self.interruption.saved_step
        from_there = (
            ""
            if saved is None
            else (f", perhaps from the checkpoint of step {saved} of this one (init.from_run={str(self.run_dir)!r})")
        )
        return InputError(
            f"the {what} at step {step} and the run was stopped: begin another run_dir with less than "
            f"optimizer.learning_rate={rate}{from_there}."
        )

    def _make_up_for_evaluations(self) -> None:
        """Measures what was due at the step of the checkpoint, if the run left without that."""
        if not self.step:
            return
        told = processes.agree(lambda: _told_at(self.run_dir, self.step))
        for name in self.evaluators:
            is_told = any(field.startswith(f"{name}_") for field in told)
            if self._is_due(self.config.evaluators[name].every_steps) and not is_told:
                self._evaluate(name)

    def _evaluate(self, name: str) -> None:
        self._tell(self.meter.drain())
        with self.terminal.stage(f"evaluating step {self.step}"):
            self.measured[name] = measured = self.evaluators[name].measure(self.state)
        if self.log is not None:
            self.log.write({"step": self.step, **_named(name, measured)}, group=name)
        told = ", ".join(f"{figure.replace('_', ' ')} {value:.4f}" for figure, value in measured.items())
        self.terminal.say(f"step {self.step}: {name} {told}")
        self.meter.restart()

    def _save(self) -> None:
        # A step that was not sane must not become a checkpoint: telling it stops the run first.
        self._tell(self.meter.drain())
        with processes.led_by_first():
            self.lock.check()
        self.checkpoints.save(self.step, self.state, self.iterator)
        self.saving = self.step
        self.meter.restart()

    def _wait_for_save(self) -> None:
        if self.saving is not None:
            self.checkpoints.wait()
            self.interruption.saved_step, self.saving = self.saving, None
            self.interruption.has_unsaved = self.interruption.saved_step != self.step

    def _leave_if_asked(self) -> None:
        if self.interruption.signal is not None:
            self._leave()

    def _leave(self) -> None:
        """Saves at once, for whoever sent the signal gives little time, and ends the process."""
        self._tell(self.meter.flush())
        if self.step not in (self.saving, self.interruption.saved_step):
            self._save()
        self._wait_for_save()
        self.interruption.leave()


def _named(evaluator: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {f"{evaluator}_{name}": value for name, value in figures.items()}


def _parameters(state: nnx.State) -> list[tuple[tuple, Any]]:
    return list(nnx.to_flat_state(nnx.filter_state(state, nnx.Param)))


def _count(state: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))


def _told_at(run_dir: Path, step: int) -> list[str]:
    """Fields of the records of a step."""
    records = read_records(run_dir / "metrics.jsonl")
    return sorted({field for record in records if record["step"] == step for field in record})


def _summary_of_finished(run_dir: Path, latest_step: int | None, num_steps: int) -> dict[str, Any] | None:
    path = run_dir / "summary.json"
    if latest_step is None or not path.exists():
        return None
    try:
        summary = json.loads(path.read_text("utf-8"))
        is_over = latest_step >= num_steps or summary.get("data_ended", False)
        return summary if is_over and summary["steps"] == latest_step else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as the summary of a run: remove it, and the same command writes it again."
        ) from error


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
