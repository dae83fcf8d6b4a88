import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.ops.cross_entropy import Head, likeliest_tokens, token_log_probs, vocabulary_logits

# float32 sums in another order: the largest measured error is 1.2e-7 of the loss or of a gradient's largest entry.
TOLERANCE = 1e-6


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, table = 3 * jax.random.normal(keys[0], (2, 12, 5)), jax.random.normal(keys[1], (17, 5))
    targets = jax.random.randint(keys[2], (2, 12), 0, 17)
    weights = jax.random.uniform(keys[3], (2, 12)) * (jnp.arange(12) % 3 > 0)
    return hidden, table, targets, weights


def whole(hidden, table, targets, weights, cap):
    logits = hidden @ table.T
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    losses = -jax.nn.log_softmax(logits)[jnp.arange(2)[:, None], jnp.arange(12), targets]
    return jnp.sum(losses * weights)


@pytest.mark.parametrize("chunk", [1, 4, 12])
@pytest.mark.parametrize("cap", [0.0, 2.5])
def test_value_and_gradient_are_those_of_the_whole(inputs, cap, chunk):
    hidden, table, targets, weights = inputs

    def in_chunks(hidden, table, weights):
        return -jnp.sum(token_log_probs(hidden, Head(table, cap), targets, chunk=chunk) * weights)

    def at_once(hidden, table, weights):
        return whole(hidden, table, targets, weights, cap)

    given, expected = (
        jax.value_and_grad(function, argnums=(0, 1, 2))(hidden, table, weights) for function in (in_chunks, at_once)
    )
    for ours, plain in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=TOLERANCE * np.abs(plain).max())


def test_the_cap_bounds_logits_and_keeps_small_ones():
    table = jnp.array([[-1e4], [-0.01], [0.0], [0.01], [1e4]])
    capped, plain = (vocabulary_logits(jnp.ones(1), Head(table, cap)) for cap in (30.0, 0.0))
    np.testing.assert_allclose(capped, [-30, -0.01, 0, 0.01, 30], rtol=1e-6)
    np.testing.assert_array_equal(plain, table[:, 0])


def test_the_likeliest_tokens_are_those_of_all_logits(inputs):
    hidden, table, _, _ = inputs
    given = likeliest_tokens(hidden, Head(table, 2.5), chunk=4)
    np.testing.assert_array_equal(given, np.argmax(hidden @ table.T, axis=-1))


def test_logits_are_float32_whatever_goes_in(inputs):
    hidden, table, _, _ = inputs
    assert vocabulary_logits(hidden.astype(jnp.bfloat16), Head(table, 30.0)).dtype == jnp.float32


def test_a_chunk_that_does_not_divide_the_row_is_refused(inputs):
    hidden, table, targets, _ = inputs
    with pytest.raises(ValueError, match="chunk=5 does not divide the 12"):
        token_log_probs(hidden, Head(table, 0.0), targets, chunk=5)


def test_the_logits_of_a_whole_row_never_exist(inputs):
    """Neither forward nor backward: no array of the compiled program has B * T * V numbers."""
    hidden, table, targets, weights = inputs

    def loss(hidden, chunk):
        return -jnp.sum(token_log_probs(hidden, Head(table, 30.0), targets, chunk=chunk) * weights)

    for chunk, exists in ((4, False), (12, True)):
        text = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(hidden, chunk))
        assert ("f32[2,12,17]" in text) == exists
