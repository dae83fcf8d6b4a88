import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.sharding import batch_sharding, make_mesh
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.program import make_program
from gemma4_jax.train.state import create_state
from tests.train.tiny import FREEZE_VISION, typed


class Session:
    """A state, a step and batches, on one device or with everything spread over some."""

    def __init__(self, config, num_devices=1):
        self.mesh = make_mesh({"fsdp": num_devices}, jax.devices()[:num_devices])
        self.iterator = make_train_iterator(typed(config).resolved(), Tokenizer.load("bundled"))
        with jax.set_mesh(self.mesh):
            program = make_program(typed(config), self.mesh)
            self.state, self.step = create_state(program.state, program.config), program.train_step

    def run(self, state, batch):
        with jax.set_mesh(self.mesh):
            # The step donates its state; tests look at it afterwards.
            return self.step(jax.tree.map(lambda x: x.copy(), state), jax.device_put(batch, batch_sharding(self.mesh)))


def arrays(state: nnx.State) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(shallow_config):
    shallow_config.train.load_balance_weight = 0.0  # not a sum over rows
    shallow_config.optimizer.clip_norm = 1e9
    whole = Session(shallow_config)
    batch = next(whole.iterator)
    # Pieces of very different loss weight: a mean of the pieces' means would differ.
    weights = batch.loss_weights * np.where(np.arange(len(batch.tokens)) % 2, 1.0, 0.05)[:, None].astype(np.float32)
    batch = dataclasses.replace(batch, loss_weights=weights)
    one, one_metrics = whole.run(whole.state, batch)
    shallow_config.train.grad_accum_steps = 4
    pieces = Session(shallow_config, num_devices=2)
    four, four_metrics = pieces.run(pieces.state, batch)
    np.testing.assert_allclose(four_metrics.means["loss"], one_metrics.means["loss"], rtol=1e-5)
    np.testing.assert_allclose(four_metrics.grad_norm, one_metrics.grad_norm, rtol=1e-4)
    assert int(four_metrics.tokens) == int(one_metrics.tokens)
    expected = arrays(one.opt_state[1].mu)
    for path, moment in arrays(four.opt_state[1].mu).items():
        # float32 sums in another order: the largest measured error is 9e-7 of the largest entry.
        scale = np.abs(expected[path]).max()
        np.testing.assert_allclose(moment, expected[path], atol=9e-6 * scale, rtol=0, err_msg=str(path))


@pytest.mark.slow
def test_frozen_group_stays_bit_identical_and_the_rest_learns(shallow_config):
    shallow_config.optimizer.groups = FREEZE_VISION
    session = Session(shallow_config)
    before, state, losses = arrays(session.state.model), session.state, []
    batch = next(session.iterator)
    for _ in range(3):
        state, metrics = session.run(state, batch)
        losses.append(float(metrics.means["loss"]))
    after, trained = arrays(state.model), arrays(state.trained)
    is_vision = {path: path[0] in ("vision", "image_projection") for path in before}
    assert trained.keys() == {path for path in arrays(nnx.filter_state(state.model, nnx.Param)) if not is_vision[path]}
    for path in before:
        is_same = np.array_equal(before[path], after[path])
        assert is_same == (path not in trained), path
    assert losses[-1] < losses[0]
    frozen_names = {path[0] for path in arrays(state.opt_state[1].mu)}
    assert not frozen_names & {"vision", "image_projection"}


@pytest.mark.slow
def test_frozen_parameters_may_be_kept_in_bfloat16(shallow_config):
    shallow_config.optimizer.groups = FREEZE_VISION
    whole = Session(shallow_config)
    shallow_config.train.frozen_dtype = "bfloat16"
    half = Session(shallow_config)
    batch = next(whole.iterator)
    kept = arrays(nnx.filter_state(whole.state.frozen, nnx.Param))
    for path, value in arrays(nnx.filter_state(half.state.frozen, nnx.Param)).items():
        assert path[0] in ("vision", "image_projection")
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, kept[path].astype(jnp.bfloat16))
    for (path, leaf), other in zip(
        nnx.to_flat_state(half.state.trained), jax.tree.leaves(whole.state.trained), strict=True
    ):
        np.testing.assert_array_equal(leaf.get_value(), other, err_msg=str(path))
    losses = [float(session.run(session.state, batch)[1].means["loss"]) for session in (whole, half)]
    # So little of the loss depends on images at first that it may be the same in float32.
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.slow
def test_metrics_count_the_batch_and_flag_what_is_not_sane(shallow_config):
    session = Session(shallow_config)
    batch = next(session.iterator)
    state, metrics = session.run(session.state, batch)
    assert int(state.step) == 1
    assert int(metrics.tokens) == np.sum(batch.segment_ids > 0)
    assert int(metrics.images) == sum(len(set(row[row > 0])) for row in batch.patch_image_ids)
    assert metrics.means["expert_load"].shape == (2, 4)
    np.testing.assert_allclose(metrics.means["expert_load"].sum(axis=-1), 1.0, rtol=1e-5)
    assert bool(metrics.is_sane)
    empty = dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
    _, metrics = session.run(session.state, empty)
    assert bool(metrics.is_sane)
    assert float(metrics.means["loss"]) == 0.0
    broken = jax.tree.map(lambda x: x * np.nan, session.state.trained)
    _, metrics = session.run(dataclasses.replace(session.state, trained=broken), batch)
    assert not bool(metrics.is_sane)
