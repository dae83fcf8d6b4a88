import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.errors import InputError
from gemma4_jax.model import Gemma4
from gemma4_jax.run_config import GroupConfig, OptimizerConfig
from gemma4_jax.sizes import SIZES
from gemma4_jax.train.optimizer import group_of, make_optimizer, make_schedule, split_trained
from tests.train.tiny import typed


@pytest.fixture
def params(tiny_config) -> nnx.State:
    """Ones in the shape of the tiny model's parameters."""
    model = nnx.eval_shape(lambda: Gemma4(typed(tiny_config).model, nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), nnx.state(model, nnx.Param))


def by_path(state: nnx.State) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


def grouped(**scales: float) -> OptimizerConfig:
    """Groups by the name that the paths of their parameters begin with."""
    return OptimizerConfig(
        groups=tuple(GroupConfig(rf"{name}\..*", learning_rate_scale=scale) for name, scale in scales.items())
    )


def test_the_first_group_that_matches_decides():
    scale = "decoder", "own", "layers", 0, "pre_mlp_norm", "scale"
    layers, norms = GroupConfig(r"decoder\.own\.layers\.0\..*"), GroupConfig(r".*norm\.scale")
    assert group_of(scale, [layers, norms]) is layers
    assert group_of(scale, [norms, layers]) is norms
    assert group_of(scale, [GroupConfig("norm"), GroupConfig("decoder")]) is None  # the whole path must match


def test_a_group_that_matches_nothing_is_refused_with_the_nearest_path(params):
    with pytest.raises(InputError, match=r"'visoin\\..*', which matches no parameter.* such as vision\."):
        split_trained(params, grouped(visoin=0.5), unreached=())
    with pytest.raises(InputError, match="freezes every parameter"):
        split_trained(params, OptimizerConfig(groups=(GroupConfig(".*", learning_rate_scale=0.0),)), unreached=())


def test_schedule_warms_up_to_the_peak_and_ends_at_its_fraction():
    optimizer = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_learning_rate_fraction=0.25)
    rates = np.array([make_schedule(optimizer, num_steps=20)(step) for step in range(20)])
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[19], 0.5, rtol=1e-6)
    assert np.all(np.diff(rates[3:]) < 0)


def test_no_warmup_starts_at_the_peak():
    optimizer = OptimizerConfig(warmup_steps=0)
    np.testing.assert_allclose(make_schedule(optimizer, num_steps=1000)(0), optimizer.learning_rate, rtol=1e-4)


def test_frozen_groups_are_split_off_and_have_no_optimizer_state(params):
    optimizer = grouped(vision=0.0, image_projection=0.0)
    trained, frozen = split_trained(params, optimizer, unreached=())
    assert {path[0] for path in by_path(frozen)} == {"vision", "image_projection"}
    assert {path[0] for path in by_path(trained)} == {"embedder", "per_layer_embedder", "decoder"}
    opt_state = make_optimizer(optimizer, 100).transform.init(trained)
    moments = sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained))


def test_what_no_document_reaches_is_frozen_whatever_groups_say():
    params = nnx.state(nnx.eval_shape(lambda: Gemma4(SIZES["e2b"](), nnx.Rngs(0))), nnx.Param)
    _, frozen = split_trained(params, grouped(audio=0.5), unreached={"audio", "audio_projection"})
    assert {path[0] for path, _ in nnx.to_flat_state(frozen)} == {"audio", "audio_projection"}
    trained, frozen = split_trained(params, grouped(audio=0.5), unreached=())
    assert not jax.tree.leaves(frozen)
    assert "audio" in {path[0] for path, _ in nnx.to_flat_state(trained)}


def test_updates_are_adamw_by_hand(params):
    """Two steps in numpy: gradients cut to a norm, both moments, decay, and what the groups say of rate and decay."""
    scales = {"vision": 0.1, "image_projection": 0.1, "embedder": 2.0}
    groups = (*grouped(**scales).groups, GroupConfig(r".*gate\.kernel", weight_decay=0.3))
    config = OptimizerConfig(
        learning_rate=0.5, warmup_steps=4, weight_decay=0.1, clip_norm=3.0, b1=0.8, b2=0.6, eps=1e-3, groups=groups
    )
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
            is_gate = path[-2:] == ("gate", "kernel") and path[0] == "decoder"
            # Parameters are one. The stacked axis of a scan does not make a matrix of a vector.
            decay = 0.0 if path[-1] in ("scale", "per_expert_scale") else 0.3 if is_gate else 0.1
            moved = first[path] / (1 - 0.8**step) / (np.sqrt(second[path] / (1 - 0.6**step)) + 1e-3)
            expected = -rate * scales.get(path[0], 1.0) * (moved + decay)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=str(path))


def test_gradients_within_the_norm_are_left_alone(params):
    config = OptimizerConfig()
    optimizer = make_optimizer(config, num_steps=100).transform
    small = jax.tree.map(lambda leaf: 1e-6 * leaf, params)
    _, opt_state = jax.jit(optimizer.update)(small, optimizer.init(params), params)
    for moment in jax.tree.leaves(opt_state[1].mu):
        np.testing.assert_allclose(moment, 1e-6 * (1 - config.b1), rtol=1e-4)
