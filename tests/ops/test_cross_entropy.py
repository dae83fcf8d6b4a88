import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemma4_jax.ops.cross_entropy import Head, likeliest_tokens, token_log_probs, total_log_prob, vocabulary_logits
from gemma4_jax.sharding import BATCH_AXES, make_mesh

# float32 sums in another order: the largest measured error is 1.2e-7 of the loss or of a gradient's largest entry.
TOLERANCE = 1e-6


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, table = 3 * jax.random.normal(keys[0], (2, 12, 5)), jax.random.normal(keys[1], (17, 5))
    targets = jax.random.randint(keys[2], (2, 12), 0, 17)
    weights = jax.random.uniform(keys[3], (2, 12)) * (jnp.arange(12) % 3 > 0)
    return hidden, table, targets, weights


def by_token(hidden, table, targets, weights, chunk, cap=30.0):
    return -jnp.sum(token_log_probs(hidden, Head(table, cap), targets, chunk=chunk) * weights)


def in_total(hidden, table, targets, weights, chunk, cap=30.0):
    return -total_log_prob(hidden, Head(table, cap), targets, weights, chunk=chunk)[0]


LOSSES = pytest.mark.parametrize("loss", [by_token, in_total])


def last_turn_only(weights):
    """Loss on the last two positions of a row alone, so that most chunks carry none."""
    return weights * (jnp.arange(weights.shape[1]) >= 10)


def whole(hidden, table, targets, weights, cap):
    logits = hidden @ table.T
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    losses = -jax.nn.log_softmax(logits)[jnp.arange(2)[:, None], jnp.arange(12), targets]
    return jnp.sum(losses * weights)


@LOSSES
@pytest.mark.parametrize("masked", [lambda weights: weights, last_turn_only], ids=["most", "last turn"])
@pytest.mark.parametrize("chunk", [1, 4, 12])
@pytest.mark.parametrize("cap", [0.0, 2.5])
def test_value_and_gradient_are_those_of_the_whole(inputs, cap, chunk, masked, loss):
    hidden, table, targets, weights = inputs
    weights = masked(weights)

    def in_chunks(hidden, table, weights):
        return 0.5 * loss(hidden, table, targets, weights, chunk, cap)

    def at_once(hidden, table, weights):
        return 0.5 * whole(hidden, table, targets, weights, cap)

    given, expected = (
        jax.value_and_grad(function, argnums=(0, 1, 2))(hidden, table, weights) for function in (in_chunks, at_once)
    )
    for ours, plain in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=TOLERANCE * np.abs(plain).max())


def with_z_loss(hidden, table, targets, weights, cap):
    """Losses and squared log-sum-exps of all logits at once, summed."""
    logits = hidden @ table.T
    log_sum = jax.nn.logsumexp(cap * jnp.tanh(logits / cap) if cap else logits, axis=-1)
    return whole(hidden, table, targets, weights, cap) + 0.3 * jnp.sum(weights * log_sum**2)


def z_loss_in_chunks(hidden, table, targets, weights, cap):
    return -total_log_prob(hidden, Head(table, cap), targets, weights, chunk=4, z_weight=0.3)[0]


@pytest.mark.parametrize("cap", [0.0, 2.5])
def test_the_z_loss_is_the_squared_log_sum_exp_in_value_and_gradient(inputs, cap):
    hidden, table, targets, weights = inputs
    given, expected = (
        jax.value_and_grad(function, argnums=(0, 1, 3))(hidden, table, targets, weights, cap)
        for function in (z_loss_in_chunks, with_z_loss)
    )
    for ours, plain in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=TOLERANCE * np.abs(plain).max())
    total, z_loss = total_log_prob(hidden, Head(table, cap), targets, weights, chunk=4, z_weight=0.3)
    np.testing.assert_allclose(-total - 0.3 * z_loss, whole(hidden, table, targets, weights, cap), rtol=TOLERANCE)


@pytest.mark.parametrize("cap", [0.0, 2.5])
def test_over_a_sharded_vocabulary_loss_and_z_loss_are_the_same(cap):
    """No device has all logits of a position."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (2, 12, 4)), jax.random.normal(keys[1], (32, 4))
    targets, weights = jax.random.randint(keys[2], (2, 12), 0, 32), jnp.ones((2, 12))
    expected = jax.value_and_grad(with_z_loss, argnums=(0, 1))(hidden, table, targets, weights, cap)
    with jax.set_mesh(make_mesh({"tensor": 4, "data": 2})):
        place = functools.partial(NamedSharding, jax.sharding.get_mesh())
        rows, table = place(PartitionSpec(BATCH_AXES)), jax.device_put(table, place(PartitionSpec("tensor")))
        arrays = [jax.device_put(x, rows) for x in (hidden, targets, weights)]
        gradient = jax.jit(jax.value_and_grad(z_loss_in_chunks, argnums=(0, 1)), static_argnums=4)
        compiled = gradient.lower(arrays[0], table, *arrays[1:], cap).compile()
        given = compiled(arrays[0], table, *arrays[1:])
    assert "f32[4,8]" in compiled.as_text()  # 4 positions of a row, a quarter of the vocabulary
    assert ",32]" not in compiled.as_text()
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


@LOSSES
def test_the_logits_of_a_whole_batch_never_exist(inputs, loss):
    """Neither forward nor backward: no array of the program has B * T * V numbers, but those of a chunk."""
    hidden, table, targets, weights = inputs
    for chunk in (4, 12):
        gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)), static_argnums=4)
        text = str(gradient(hidden, table, targets, weights, chunk))
        assert f"f32[{2 * chunk},17]" in text
        assert ("f32[24,17]" in text) == (chunk == 12)


@pytest.mark.parametrize(("loss", "products"), [(by_token, 4), (in_total, 3)])
def test_logits_are_made_once_forward_and_at_most_once_backward(inputs, loss, products):
    """Further matmuls are the gradient of the hidden states and that of the table."""
    hidden, table, targets, weights = inputs
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)), static_argnums=4)(hidden, table, targets, weights, 4))
    assert text.count("dot_general") == products


def test_logits_of_any_size_have_finite_log_probs_and_gradients():
    """Also where their exponentials are beyond float32, above and below, whether or not a cap bounds them."""
    hidden, table, targets = 1e3 * jnp.ones((1, 2, 1)), jnp.array([[-1.0], [-0.9], [1.0]]), jnp.array([[0, 2]])
    for cap, expected in ((0.0, [-2e3, 0]), (1e3, [-2e3 * np.tanh(1), 0]), (30.0, [-60, 0])):
        log_probs = token_log_probs(hidden, Head(table, cap), targets, chunk=1)
        np.testing.assert_allclose(log_probs[0], expected, rtol=1e-6)
        low = token_log_probs(-hidden, Head(jnp.abs(table), cap), targets, chunk=1)
        assert np.isfinite(low).all()
        gradients = jax.grad(lambda table, cap=cap: token_log_probs(hidden, Head(table, cap), targets, chunk=1).sum())
        assert np.isfinite(gradients(table)).all()


def test_the_gradient_of_the_table_is_summed_in_float32():
    """A thousand tokens that each add a little to what is large: in bfloat16 nothing of it would arrive."""
    hidden = jnp.ones((1, 1024, 1), jnp.bfloat16)
    table, targets = jnp.zeros((2, 1)), jnp.zeros((1, 1024), jnp.int32)
    gradient = jax.grad(lambda table: token_log_probs(hidden, Head(table, 0.0), targets, chunk=1).sum())(table)
    np.testing.assert_array_equal(gradient, [[512], [-512]])


@LOSSES
@pytest.mark.parametrize("mesh", [{"context": 4, "data": 2}, {"context": 2, "tensor": 1, "fsdp": 2, "expert": 2}])
def test_shards_of_positions_each_compute_their_part_of_a_chunk(mesh, loss):
    """What a device computes of a chunk's logits are its own rows and positions, and the result is the same."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (4, 16, 4)), jax.random.normal(keys[1], (32, 4))
    targets, weights = jax.random.randint(keys[2], (4, 16), 0, 32), jnp.ones((4, 16))
    expected = jax.grad(loss, argnums=(0, 1))(hidden, table, targets, weights, 8)
    with jax.set_mesh(make_mesh(mesh)):
        rows = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(BATCH_AXES, "context"))
        arrays = [jax.device_put(x, rows) for x in (hidden, targets, weights)]
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=4)
        compiled = gradient.lower(arrays[0], table, *arrays[1:], 8).compile()
        given = compiled(arrays[0], table, *arrays[1:])
    assert "f32[4,32]" in compiled.as_text()  # 4 rows of 8 positions, over 8 devices
    assert "f32[32,32]" not in compiled.as_text()
    for ours, plain in zip(given, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=TOLERANCE * np.abs(plain).max())
