"""Rotary angles are right at any position that a model is meant for."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.rope import rotary_angles, rotary_frequencies, rotate
from gemma4_jax.sizes import SIZES

POSITIONS = np.concatenate([np.arange(600), [4095, 8191, 32767, 131071, 200_003, 262_143]])


def kinds(size: str):
    text = SIZES[size]().text
    yield text.head_dim, text.rope_theta, 1.0
    yield text.global_head_dim, text.global_rope_theta, text.global_rope_fraction


@pytest.mark.parametrize("size", ["e2b", "31b", "tiny"])
def test_angles_are_those_of_whole_arithmetic_up_to_the_last_position(size):
    for head_dim, theta, fraction in kinds(size):
        angles = np.asarray(rotary_angles(jnp.asarray(POSITIONS), rotary_frequencies(head_dim, theta, fraction)))
        pairs = np.arange(head_dim // 2)
        exact = POSITIONS[:, None] * np.where(pairs < fraction * head_dim / 2, theta ** (-2.0 * pairs / head_dim), 0.0)
        assert np.abs(angles).max() <= np.float32(np.pi)
        # Half a unit in the last place of pi, and what 46 bits leave out of 262,143 positions: 2.4e-7 is the largest.
        turned = np.angle(np.exp(1j * (angles.astype(np.float64) - exact)))
        np.testing.assert_allclose(turned, 0, atol=4e-7)


def test_the_slowest_pairs_turn_too():
    """By a millionth of a radian a position in a global layer; the unit of angles is 2^-32 of a turn, 1.5e-9."""
    frequencies = rotary_frequencies(512, 1_000_000.0)
    angles = np.asarray(rotary_angles(jnp.arange(1, 9), frequencies))
    np.testing.assert_allclose(angles[:, -1], np.arange(1, 9) * frequencies[-1], rtol=0, atol=1.5e-9)


def test_what_queries_and_keys_give_depends_on_how_far_apart_they_are():
    frequencies = rotary_frequencies(64, 10_000.0)
    q, k = (jnp.asarray(np.random.default_rng(i).standard_normal((1, 1, 1, 64)), jnp.float32) for i in range(2))

    def score(place: int) -> float:
        at = rotary_angles(jnp.asarray([[place, place - 37]]), frequencies)
        return float(jnp.sum(rotate(q, at[:, :1]) * rotate(k, at[:, 1:])))

    # float32 sums: the largest measured difference is 1.3e-6.
    np.testing.assert_allclose([score(place) for place in (1000, 131_072, 262_143)], score(37), atol=1e-5)
