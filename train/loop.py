"""`train`: a whole run, from its config to its report, and on from wherever it was stopped."""

import contextlib
import json
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gemma4_jax.batch import Batch
from gemma4_jax.config import Gemma4Config
from gemma4_jax.data.pipeline import EvalItem, eval_batches, make_train_iterator, read_counters
from gemma4_jax.errors import InputError
from gemma4_jax.sharding import BATCH_AXES, batch_sharding, make_mesh
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.checkpoint import Checkpoints
from gemma4_jax.train.evaluate import Reading, evaluate, read_greedily
from gemma4_jax.train.initialize import initial_values
from gemma4_jax.train.metrics import Meter, MetricsLog, Terminal, read_records
from gemma4_jax.train.report import summarize, write_report, write_summary
from gemma4_jax.train.run_dir import open_run_dir
from gemma4_jax.train.state import TrainState, abstract_state, create_state
from gemma4_jax.train.step import make_eval_step, make_train_step

NUM_SAMPLES = 24
"""Held-out images that the report shows."""


HeldOut = Sequence[tuple[Batch, list[EvalItem]]]
"""What `data.pipeline.eval_batches` gives."""


def train(config: Any, model_config: Gemma4Config) -> dict[str, Any]:
    """Trains, evaluates and reports a run; goes on from the last checkpoint where its run directory holds one.

    On SIGTERM the run saves a checkpoint and leaves by SystemExit(143).

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
    tokenizer = Tokenizer.load(config.tokenizer)
    with contextlib.ExitStack() as stack:
        iterator = make_train_iterator(
            config, model_config, tokenizer, process_index=jax.process_index(), process_count=jax.process_count()
        )
        stack.callback(iterator.close)
        held_out = eval_batches(config, model_config, tokenizer, config.eval.batch_size)
        structure = abstract_state(model_config, config, mesh)
        # Only now: a run that cannot begin leaves no config behind that the next one would have to be like.
        run_dir = open_run_dir(config)
        checkpoints = Checkpoints(run_dir, config.checkpoint.keep)
        stack.callback(checkpoints.close)
        if (summary := _summary_of_finished(run_dir, checkpoints.latest_step, config.train.num_steps)) is not None:
            if jax.process_index() == 0:
                print(f"{run_dir} holds the finished run: there is nothing left to do.")
            return summary
        with jax.set_mesh(mesh):
            run = _Run(config, model_config, mesh, structure, run_dir, iterator, held_out, checkpoints)
            run.train()
            return run.finish(tokenizer, started)


class _Run:
    """One start of a run: what it works on, and everything that watches it."""

    def __init__(
        self,
        config: Any,
        model_config: Gemma4Config,
        mesh: Mesh,
        structure: tuple[nnx.GraphDef, TrainState],
        run_dir: Path,
        iterator: grain.DatasetIterator,
        held_out: HeldOut,
        checkpoints: Checkpoints,
    ) -> None:
        self.config, self.mesh, self.run_dir = config, mesh, run_dir
        self.iterator, self.held_out, self.checkpoints = iterator, held_out, checkpoints
        self.num_steps = config.train.num_steps
        self.graphdef, abstract = structure
        latest = checkpoints.latest_step
        if latest is None:
            values = initial_values(config.init, model_config, abstract, run_dir)
            self.step, self.state = 0, create_state(abstract, model_config, config, values)
        else:
            self.step, self.state = latest, checkpoints.restore(latest, abstract, iterator)
        self.forward = make_eval_step(self.graphdef, self.state, config, mesh)
        self.meter = Meter(config.log.every_steps, self.num_steps, config.data.batch_size * config.data.seq_len)
        is_first = jax.process_index() == 0
        self.terminal = Terminal(self.num_steps, self.step, is_shown=is_first)
        self.log = MetricsLog(run_dir, self.step, tensorboard=config.log.tensorboard) if is_first else None
        self.evaluation: dict[str, Any] | None = None
        self.compile_seconds = 0.0

    def train(self) -> None:
        """Takes the steps that are left."""
        train_step = None
        with self.terminal, _Preemption() as preemption:
            if self.step:
                self.terminal.say(f"resumed from the checkpoint of step {self.step}")
                if self._is_due(self.config.eval.every_steps) and self.held_out and not self._is_evaluated():
                    self._evaluate()  # it left without that
            while self.step < self.num_steps:
                batch, data_wait = self._next_batch()
                if train_step is None:
                    train_step, data_wait = self._compile(batch), 0.0
                self.state, metrics = train_step(self.state, batch)
                self.step += 1
                self._tell(self.meter.add(self.step, metrics, data_wait))
                must_stop = preemption.is_due(self.step)
                if must_stop:
                    self._leave()
                if self._is_due(self.config.eval.every_steps) and self.held_out:
                    self._evaluate()
                if self._is_due(self.config.checkpoint.every_steps):
                    self._save()

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
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            "data": read_counters(self.iterator),
        }
        if self.log is not None:
            self.log.close()
            # The report first: a summary says that the run is finished.
            write_report(self.run_dir, self.config.name, summary, records, readings, tokenizer)
            write_summary(self.run_dir, summary)
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
        put = partial(jax.make_array_from_process_local_data, batch_sharding(self.mesh))
        return jax.tree.map(put, local), data_wait

    def _compile(self, batch: Batch) -> Any:
        began = time.perf_counter()
        step = make_train_step(self.graphdef, self.state, self.config, self.mesh).lower(self.state, batch).compile()
        self.compile_seconds = time.perf_counter() - began
        self.terminal.say(f"compiled the training step in {self.compile_seconds:.1f} s")
        if not self.held_out:
            self.terminal.say("nothing is evaluated: no source of data.mixture holds documents back; see eval.source")
        self.meter.restart()
        return step

    def _is_due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.num_steps

    def _tell(self, records: Sequence[dict[str, Any]]) -> None:
        """Logs training records; stops the run at one that is not made of numbers."""
        for record in records:
            if self.log is not None:
                self.log.write(record)
            self.terminal.show(record)
            if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                raise InputError(
                    f"the loss or its gradient is not a number at step {record['step']} and the run was stopped: begin "
                    f"another run_dir with less than optimizer.learning_rate={self.config.optimizer.learning_rate}, "
                    f"perhaps from the last checkpoint of this one (init.from_run={str(self.run_dir)!r})."
                )

    def _is_evaluated(self) -> bool:
        records = read_records(self.run_dir / "metrics.jsonl")
        return any(record["step"] == self.step and "eval_loss" in record for record in records)

    def _evaluate(self) -> None:
        self._tell(self.meter.drain())
        self.evaluation = evaluate(self._forward, self.held_out, self.mesh)
        loss, exact_match = self.evaluation["loss"], self.evaluation["exact_match"]
        if self.log is not None:
            self.log.write({"step": self.step, "eval_loss": loss, "eval_exact_match": exact_match})
        share = "" if exact_match is None else f", {exact_match:.1%} of images read exactly"
        self.terminal.say(f"step {self.step}: held-out loss {loss:.4f}{share}")
        self.meter.restart()

    def _save(self) -> None:
        # A step that was not made of numbers must not become a checkpoint: telling it stops the run first.
        self._tell(self.meter.drain())
        self.checkpoints.save(self.step, self.state, self.iterator)
        self.meter.restart()

    def _leave(self) -> None:
        """Saves at once, for whoever sent the signal gives little time, and ends the process."""
        self._tell(self.meter.flush())
        self._save()
        self.checkpoints.close()
        self.terminal.say(f"SIGTERM: saved step {self.step}; the same command goes on from there")
        raise SystemExit(128 + signal.SIGTERM)

    def _forward(self, batch: Batch) -> Any:
        return self.forward(self.state.params, self.state.buffers, batch)

    def _read_samples(self) -> list[Reading]:
        readings: list[Reading] = []
        for batch, items in self.held_out:
            if items and len(readings) < NUM_SAMPLES:
                readings += read_greedily(self._forward, batch, items, self.mesh)
        return readings[:NUM_SAMPLES]


class _Preemption:
    """Notices SIGTERM, by which clusters take machines back. A context manager.

    With many processes jax.distributed has its own handler, and agrees with the others on the step to stop after.
    """

    def __init__(self) -> None:
        self._is_signalled = False
        self._has_handler = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "_Preemption":
        if self._has_handler:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_handler:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, *_: object) -> None:
        self._is_signalled = True

    def is_due(self, step: int) -> bool:
        """Whether the run is to stop after this step; every process asks at every step."""
        return self._is_signalled or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))


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
    summary = json.loads(path.read_text("utf-8"))
    return summary if summary["steps"] == latest_step else None


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
