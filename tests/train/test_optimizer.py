import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.configs import base
from gemma4_jax.launch.run_config import model_config
from gemma4_jax.model import Gemma4
from gemma4_jax.sizes import SIZES
from gemma4_jax.train.optimizer import decay_mask, group_of, make_optimizer, make_schedule, split_trained


@pytest.fixture
def params(tiny_config) -> nnx.State:
    """Ones in the shape of the tiny model's parameters."""
    model = nnx.eval_shape(lambda: Gemma4(model_config(tiny_config), nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), nnx.state(model, nnx.Param))


def by_path(state: nnx.State) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


def test_groups_by_path(params):
    groups: dict[str, set] = {}
    for path in by_path(params):
        groups.setdefault(group_of(path), set()).add(path)
    assert groups["embedding"] == {("embedder", "table"), ("per_layer_embedder", "table")}
    assert {path[0] for path in groups["vision"]} == {"vision", "image_projection"}
    assert {path[0] for path in groups["decoder"]} == {"decoder", "per_layer_embedder"}


def test_decay_is_for_matrices_and_looks_past_the_stacked_axis(params):
    mask = by_path(decay_mask(params))
    stacked_norm = ("decoder", "own", "layers", 0, "pre_mlp_norm", "scale")
    assert by_path(params)[stacked_norm].ndim == 2
    assert not mask[stacked_norm]
    assert not mask["decoder", "final_norm", "scale"]
    assert not mask["decoder", "own", "layers", 1, "moe", "router", "per_expert_scale"]
    assert mask["embedder", "table"]
    assert mask["vision", "layers", "mlp", "down", "kernel"]
    assert {path[-1] for path, is_decayed in mask.items() if not is_decayed} == {"scale", "per_expert_scale"}


def test_schedule_warms_up_to_the_peak_and_ends_at_its_fraction(tiny_config):
    optimizer = tiny_config.optimizer
    optimizer.learning_rate, optimizer.warmup_steps, optimizer.final_learning_rate_fraction = 2.0, 4, 0.25
    rates = np.array([make_schedule(optimizer, num_steps=20)(step) for step in range(20)])
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[19], 0.5, rtol=1e-6)
    assert np.all(np.diff(rates[3:]) < 0)


def test_no_warmup_starts_at_the_peak(tiny_config):
    tiny_config.optimizer.warmup_steps = 0
    rate = make_schedule(tiny_config.optimizer, num_steps=1000)(0)
    np.testing.assert_allclose(rate, tiny_config.optimizer.learning_rate, rtol=1e-4)


def test_frozen_groups_are_split_off_and_have_no_optimizer_state(params, tiny_config):
    tiny_config.optimizer.learning_rate_scale.vision = 0.0
    trained, frozen = split_trained(params, tiny_config.optimizer)
    assert {group_of(path) for path in by_path(frozen)} == {"vision"}
    assert {group_of(path) for path in by_path(trained)} == {"embedding", "decoder"}
    opt_state = make_optimizer(tiny_config.optimizer, 10).transform.init(trained)
    moments = sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained))


def test_the_audio_tower_is_never_trained():
    assert group_of(("audio", "layers", "norm", "scale")) is group_of(("audio_projection", "kernel")) is None
    params = nnx.state(nnx.eval_shape(lambda: Gemma4(SIZES["e2b"](), nnx.Rngs(0))), nnx.Param)
    _, frozen = split_trained(params, base.get_config().optimizer)
    assert {path[0] for path, _ in nnx.to_flat_state(frozen)} == {"audio", "audio_projection"}


def test_updates_are_adamw_by_hand(params, tiny_config):
    """Two steps in numpy: gradients cut to a norm, both moments, decay, and the rates of schedule and group."""
    config = tiny_config.optimizer
    config.learning_rate, config.warmup_steps, config.weight_decay, config.clip_norm = 0.5, 4, 0.1, 3.0
    config.b1, config.b2, config.eps = 0.8, 0.6, 1e-3
    config.learning_rate_scale.vision, config.learning_rate_scale.embedding = 0.1, 2.0
    scales = {"vision": 0.1, "image_projection": 0.1, "embedder": 2.0}
    rng = np.random.default_rng(0)
    optimizer = make_optimizer(config, num_steps=100).transform
    update, opt_state = jax.jit(optimizer.update), optimizer.init(params)
    first = second = dict.fromkeys(by_path(params), 0.0)
    for step, rate in ((1, 0.125), (2, 0.25)):
        gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), params)
        given = by_path(gradients)
        cut = 3.0 / np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in given.values()))
        first = {path: 0.8 * first[path] + 0.2 * cut * g for path, g in given.items()}
        second = {path: 0.6 * second[path] + 0.4 * np.square(cut * g) for path, g in given.items()}
        updates, opt_state = update(gradients, opt_state, params)
        for path, found in by_path(updates).items():
            decay = 0.0 if path[-1] in ("scale", "per_expert_scale") else 0.1  # parameters are one
            scale = 2.0 if path == ("per_layer_embedder", "table") else scales.get(path[0], 1.0)
            moved = first[path] / (1 - 0.8**step) / (np.sqrt(second[path] / (1 - 0.6**step)) + 1e-3)
            np.testing.assert_allclose(found, -rate * scale * (moved + decay), rtol=1e-4, atol=1e-6, err_msg=str(path))


def test_gradients_within_the_norm_are_left_alone(params, tiny_config):
    optimizer = make_optimizer(tiny_config.optimizer, num_steps=10).transform
    small = jax.tree.map(lambda leaf: 1e-6 * leaf, params)
    _, opt_state = jax.jit(optimizer.update)(small, optimizer.init(params), params)
    for moment in jax.tree.leaves(opt_state[1].mu):
        np.testing.assert_allclose(moment, 1e-6 * (1 - tiny_config.optimizer.b1), rtol=1e-4)
