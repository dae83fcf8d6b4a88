"""Rotary position embeddings: sliding and global layers of the decoder, and the 2-D one of the vision tower.

Rotation is half-split: channel j of the first half pairs with channel j of the second. Angles, sines and cosines are
computed in float32 and cast to the dtype of what they rotate. Source: docs/gemma4.md sections 2 and 3.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotary_frequencies(head_dim: int, theta: float, fraction: float = 1.0) -> np.ndarray:
    """Radians per position of each channel pair, [H / 2] float64.

    Args:
      head_dim: H.
      theta: base of the geometric series theta^(-2j / H).
      fraction: share of the pairs that rotate; the others get frequency 0 and pass through. The exponent divides by
        the full head dim all the same ("proportional" RoPE of global layers).
    """
    num_rotated = int(fraction * head_dim / 2)
    frequencies = theta ** -(np.arange(0, 2 * num_rotated, 2) / head_dim)
    return np.pad(frequencies, (0, head_dim // 2 - num_rotated))


def rotary_angles(positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """[...] integer positions below 2^18 -> [..., H / 2] angles in radians, float32, from -pi to pi.

    They are counted in whole numbers of 2^-32 of a turn, where whole turns fall out of 32 bits by themselves: a product
    in float32, as the reference has it, is wrong by 0.03 radians at position 262,143.
    """
    turns = frequencies / (2 * np.pi)
    # 46 bits of a turn per position, in two words: the product of the second with a position is below 2^32.
    high = np.floor(turns * 2**32)
    low = np.floor((turns * 2**32 - high) * 2**14)
    places = positions[..., None].astype(jnp.uint32)
    counted = places * high.astype(np.uint32) + ((places * low.astype(np.uint32)) >> 14)
    return jax.lax.bitcast_convert_type(counted, jnp.int32).astype(jnp.float32) * np.float32(2 * np.pi / 2**32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates every head of x by its token's angles.

    Args:
      x: [..., T, N, H].
      angles: [..., T, H / 2] float32 radians.
    Returns:
      [..., T, N, H] in x's dtype.
    """
    cos = jnp.cos(angles)[..., None, :].astype(x.dtype)
    sin = jnp.sin(angles)[..., None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate_2d(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first half of every head by the x angle and the second half by the y angle.

    Args:
      x: [..., P, N, H].
      angles: two [..., P, H / 4] arrays, float32 radians.
    """
    by_x, by_y = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([rotate(by_x, angles[0]), rotate(by_y, angles[1])], axis=-1)
