import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.sizes import quickstart
from gemma4_jax.stack import REMAT_POLICIES
from gemma4_jax.text.moe import Router

CONFIG = dataclasses.replace(quickstart().text, embed_dim=8, num_experts=4, num_experts_per_token=2, expert_dim=3)


@pytest.fixture
def router():
    return Router(nnx.Rngs(0), CONFIG, param_dtype=jnp.float32)


def tokens(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (3, 16, CONFIG.embed_dim))


ALL = jnp.ones((3, 16), bool)


def test_the_load_is_the_share_of_choices_and_sums_to_one(router):
    choices, _, stats = router(tokens(), ALL)
    np.testing.assert_allclose(jnp.sum(stats.load), 1, rtol=1e-6)
    np.testing.assert_allclose(stats.load, np.bincount(choices.ravel(), minlength=4) / choices.size, rtol=1e-6)


def test_padding_is_not_counted(router):
    is_token = jnp.arange(16) < jnp.array([[16], [5], [0]])
    _, _, stats = router(tokens(), is_token)
    elsewhere = jnp.where(is_token[..., None], tokens(), tokens(seed=1))
    _, _, same = router(elsewhere, is_token)
    for given, expected in zip(stats, same, strict=True):
        np.testing.assert_array_equal(given, expected)
    np.testing.assert_allclose(jnp.sum(stats.load), 1, rtol=1e-6)
    _, _, other = router(elsewhere, ALL)
    assert not np.array_equal(stats.load, other.load)


def test_the_z_loss_is_that_of_tokens_alone(router):
    is_token = jnp.arange(16) < jnp.array([[16], [5], [0]])
    x = np.asarray(tokens(), np.float64)
    u = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps) / np.sqrt(CONFIG.embed_dim)
    scores = (u @ np.asarray(router.kernel[...]))[np.asarray(is_token)]
    expected = np.mean(np.log(np.sum(np.exp(scores), axis=-1)) ** 2)
    np.testing.assert_allclose(router(tokens(), is_token)[2].z_loss, expected, rtol=1e-5)


def test_a_score_that_is_no_number_shows_in_the_load(router):
    router.kernel[...] = router.kernel[...].at[2, 1].set(jnp.nan)
    assert np.isnan(router(tokens(), ALL)[2].load).all()


def test_a_batch_of_padding_alone_has_no_load_and_is_a_number(router):
    _, _, stats = router(tokens(), jnp.zeros_like(ALL))
    np.testing.assert_array_equal(stats.load, 0)
    assert float(stats.load_balance_loss) == 0


def test_the_balance_loss_is_one_when_even_and_larger_when_not(router):
    # Two groups of tokens, each sure of its own two experts: all four have the same load and probability.
    router.kernel[...] = 9 * jnp.eye(8, 4)
    pairs = jnp.array([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
    _, _, even = router(jnp.tile(pairs, (3, 8, 1)), ALL)
    np.testing.assert_allclose(even.load, 0.25, rtol=1e-6)
    np.testing.assert_allclose(even.load_balance_loss, 1, rtol=1e-5)
    # All of them sure, if not certain, of the same two: E * 2 * (1/2 * 1/2).
    _, _, uneven = router(jnp.tile(pairs[:1], (3, 16, 1)), ALL)
    np.testing.assert_allclose(uneven.load, [0.5, 0.5, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(uneven.load_balance_loss, 2, rtol=1e-2)


def test_the_balance_loss_teaches_the_router(router):
    x = tokens()
    gradient = nnx.grad(lambda router: router(x, ALL)[2].load_balance_loss)(router)
    assert np.abs(gradient["kernel"][...]).max() > 0


def test_over_microbatches_the_balance_loss_teaches_what_that_of_the_batch_does(router):
    x, is_token = jax.random.normal(jax.random.key(5), (16, 256, CONFIG.embed_dim)) + 0.5, jnp.ones((16, 256), bool)

    def gradient(microbatches: int) -> np.ndarray:
        def loss(router: Router) -> jax.Array:
            each = (router(x[i::microbatches], is_token[i::microbatches])[2] for i in range(microbatches))
            return sum(stats.load_balance_loss for stats in each) / microbatches

        return np.asarray(nnx.grad(loss)(router)["kernel"][...])

    of_batch, of_microbatches = gradient(1), gradient(4)
    # The covariance of share and probability over microbatches is left out: of 1,024 tokens each, it measures 0.2%.
    assert np.linalg.norm(of_microbatches - of_batch) < 0.01 * np.linalg.norm(of_batch)


def test_weights_are_the_chosen_probabilities_made_one_and_scaled(router):
    x = 5 * tokens()
    router.scale[...] = jax.random.uniform(jax.random.key(2), (8,))
    router.per_expert_scale[...] = jnp.array([1.0, 2.0, 3.0, 4.0])
    choices, weights, _ = router(x, ALL)
    u = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps) * router.scale[...] * 8**-0.5
    probabilities = jax.nn.softmax(u @ router.kernel[...], axis=-1)
    np.testing.assert_array_equal(choices, jnp.argsort(-probabilities, axis=-1)[..., :2])
    chosen = jnp.take_along_axis(probabilities, choices, axis=-1)
    expected = chosen / chosen.sum(axis=-1, keepdims=True) * (choices + 1)
    # float32 sums in another order: the largest measured error is 2.4e-7.
    np.testing.assert_allclose(weights, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("policy", [policy for policy in REMAT_POLICIES if policy != "none"])
def test_where_a_token_goes_is_decided_once(router, policy):
    graphdef, state = nnx.split(router)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        def route(x: jax.Array) -> jax.Array:
            _, weights, stats = nnx.merge(graphdef, state)(jnp.sin(x), ALL)
            return jnp.sum(jnp.sin(weights)) + stats.load_balance_loss

        return jax.checkpoint(route, policy=REMAT_POLICIES[policy], prevent_cse=False)(x)

    assert str(jax.make_jaxpr(jax.grad(loss, argnums=1))(state, tokens())).count("top_k[") == 1
