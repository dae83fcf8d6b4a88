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
    opt_state = make_optimizer(tiny_config.optimizer, 10).init(trained)
    moments = sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained))


def test_the_audio_tower_is_never_trained():
    assert group_of(("audio", "layers", "norm", "scale")) is group_of(("audio_projection", "kernel")) is None
    params = nnx.state(nnx.eval_shape(lambda: Gemma4(SIZES["e2b"](), nnx.Rngs(0))), nnx.Param)
    _, frozen = split_trained(params, base.get_config().optimizer)
    assert {path[0] for path, _ in nnx.to_flat_state(frozen)} == {"audio", "audio_projection"}


def test_update_is_adamw_by_hand(params, tiny_config):
    """One step from equal gradients: Adam's first step is a sign, decay joins it, group and schedule scale both."""
    config = tiny_config.optimizer
    config.learning_rate, config.warmup_steps, config.weight_decay = 0.5, 0, 0.1
    config.learning_rate_scale.vision, config.learning_rate_scale.embedding = 0.1, 2.0
    optimizer = make_optimizer(config, num_steps=10**6)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    mask = by_path(decay_mask(params))
    for path, update in by_path(updates).items():
        expected = -0.5 * config.learning_rate_scale[group_of(path)] * (1.0 + 0.1 * mask[path])
        np.testing.assert_allclose(update, expected, rtol=1e-4, err_msg=str(path))


def test_gradients_are_cut_to_the_norm_over_all_trained_parameters(params, tiny_config):
    tiny_config.optimizer.clip_norm = 3.0
    optimizer = make_optimizer(tiny_config.optimizer, num_steps=10)
    _, opt_state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    first_moment = opt_state[1].mu
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(first_moment))))
    np.testing.assert_allclose(norm, 3.0 * (1 - tiny_config.optimizer.b1), rtol=1e-4)
