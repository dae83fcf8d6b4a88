"""What is minimised is handed in: the means of an objective, each with its own weight and coefficient."""

import dataclasses
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.ops.cross_entropy import Head, token_log_probs
from gemma4_jax.run_config import TrainConfig
from gemma4_jax.sharding import batch_sharding, make_mesh, param_shardings
from gemma4_jax.text.moe import RouterStats
from gemma4_jax.train.objectives import Mean, sft
from gemma4_jax.train.optimizer import make_schedule
from gemma4_jax.train.program import make_program
from gemma4_jax.train.state import create_state
from tests.hf import samples
from tests.train.test_combinations import LENGTH, TEXT, rows_of
from tests.train.tiny import typed


def confident(model, batch):
    """A stranger's objective: the cross entropy of every token, and less of it the surer the model is of the first."""
    hidden, _ = model.hidden(batch)
    log_probs = token_log_probs(hidden, model.head, batch.targets, chunk=LENGTH)
    is_first = (batch.positions == 0) & (batch.segment_ids > 0)
    return {
        "loss": Mean(-jnp.sum(log_probs * batch.loss_weights), jnp.sum(batch.loss_weights), coefficient=1.0),
        "surety": Mean(jnp.sum(log_probs * is_first), jnp.sum(is_first), coefficient=-0.5),
        "size": Mean(jnp.mean(hidden**2), 1.0),
    }


@pytest.mark.slow
def test_a_stranger_brings_an_objective_of_means_with_weights_of_their_own(tiny_config):
    batch = rows_of(TEXT, with_images=False)
    tiny_config.data.batch_size, tiny_config.train.loss_chunk = len(batch.tokens), LENGTH
    mesh = make_mesh({}, jax.devices()[:1])
    values = nnx.state(samples.model(TEXT, samples.lively_weights(TEXT)))
    tiny_config.train.grad_accum_steps = 2
    run = dataclasses.replace(typed(tiny_config), model=TEXT)
    program = make_program(run, mesh, confident)
    schedule = make_schedule(run.optimizer, run.train.num_steps)

    def whole(trained, frozen):
        means = confident(nnx.merge(program.graphdef, trained, frozen), batch)
        taken = {name: mean.total / mean.weight for name, mean in means.items()}
        return taken["loss"] - 0.5 * taken["surety"], taken

    with jax.set_mesh(mesh):
        values = jax.device_put(values, param_shardings(values, mesh))
        state = create_state(program.state, program.config, values)
        gradients, expected = jax.jit(jax.grad(whole, has_aux=True))(state.trained, state.frozen)
        norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradients))))
        _, metrics = program.train_step(state, jax.device_put(batch, batch_sharding(mesh)))
    # float32 sums in another order: the largest measured difference is 2e-7 of a value.
    for name, value in expected.items():
        np.testing.assert_allclose(metrics.means[name], value, rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=2e-6)
    np.testing.assert_allclose(metrics.learning_rate, schedule(0), rtol=1e-6)
    assert bool(metrics.is_sane)


class Told(NamedTuple):
    """A model that has its hidden states from the batch."""

    head: Head

    def hidden(self, batch):
        return batch.hidden, None


class Row(NamedTuple):
    """Of a batch, what the objective reads, and hidden states."""

    hidden: jax.Array
    targets: jax.Array
    loss_weights: jax.Array


def test_with_a_z_loss_the_cross_entropy_is_reported_and_their_sum_is_minimised():
    keys = jax.random.split(jax.random.key(0), 2)
    row = Row(jax.random.normal(keys[0], (1, 4, 3)), jnp.array([[0, 1, 2, 3]]), jnp.array([[1.0, 0.0, 2.0, 1.0]]))
    model = Told(Head(jax.random.normal(keys[1], (5, 3)), 0.0))
    plain, means = (sft.sft(TrainConfig(loss_chunk=2, z_loss_weight=weight))(model, row) for weight in (0.0, 0.5))
    assert {name: mean.coefficient for name, mean in plain.items()} == {"loss": 1.0}
    assert {name: mean.coefficient for name, mean in means.items()} == {"loss": 0.0, "loss_with_z": 1.0}
    np.testing.assert_allclose(means["loss"].total, plain["loss"].total, rtol=1e-5)
    squares = jax.nn.logsumexp(row.hidden @ model.head.table.T, axis=-1) ** 2
    added = means["loss_with_z"].total - means["loss"].total
    np.testing.assert_allclose(added, 0.5 * jnp.sum(row.loss_weights * squares), rtol=1e-5)


def test_every_layer_is_balanced_by_the_whole_weight(monkeypatch):
    monkeypatch.setattr(sft, "total_log_prob", lambda *_, **__: (jnp.float32(0), jnp.float32(0)))
    stats = RouterStats(jnp.full((3, 4), 0.25), jnp.array([1.0, 2, 3]), jnp.array([4.0, 5, 6]))
    model = types.SimpleNamespace(hidden=lambda _: (None, stats), head=None)
    batch = types.SimpleNamespace(loss_weights=jnp.ones(2), targets=None)
    means = sft.sft(TrainConfig(load_balance_weight=0.01, router_z_weight=0.1))(model, batch)
    for name, told, minimised in (("load_balance_loss", 2, 0.06), ("router_z_loss", 5, 1.5)):
        np.testing.assert_allclose(means[name].total, told, rtol=1e-6)
        np.testing.assert_allclose(means[name].coefficient * means[name].total, minimised, rtol=1e-6)
