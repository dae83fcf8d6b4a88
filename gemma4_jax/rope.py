"""Rotary position embeddings: sliding and global layers of the decoder, and the 2-D one of the vision tower.

Rotation is half-split: channel j of the first half pairs with channel j of the second. Angles, sines and cosines are
computed in float32 and cast to the dtype of what they rotate. Source: docs/gemma4.md sections 2 and 3.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotary_frequencies(head_dim: int, theta: float, fraction: float = 1.0) -> np.ndarray:
    """Radians per position of each channel pair, [H / 2] float32.

    Args:
      head_dim: H.
      theta: base of the geometric series theta^(-2j / H).
      fraction: share of the pairs that rotate; the others get frequency 0 and pass through. The exponent divides by
        the full head dim all the same ("proportional" RoPE of global layers).
    """
    num_rotated = int(fraction * head_dim / 2)
    exponents = np.arange(0, 2 * num_rotated, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(theta) ** exponents
    return np.pad(frequencies, (0, head_dim // 2 - num_rotated))


def rotary_angles(positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """[...] integer positions -> [..., H / 2] angles in radians, float32."""
    return positions[..., None].astype(jnp.float32) * frequencies


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
