"""Moving rows between two layouts, where each row goes to one place at most: a gather whose gradient is a gather."""

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def move_rows(x: jax.Array, sources: jax.Array, destinations: jax.Array) -> jax.Array:
    """out[b, j] = x[b, sources[b, j]], zero where sources is -1.

    The gradient of a plain gather is a scatter-add, which is slow on every backend. Here no row is used twice, so the
    gradient is the gather by the inverse index.

    Args:
      x: [B, P, ...].
      sources: [B, R] int32, -1 for none; no row of x twice.
      destinations: [B, P] int32, the inverse: sources[b, destinations[b, p]] == p, -1 where row p is not used.
    Returns:
      [B, R, ...].
    """
    rows = jnp.arange(x.shape[0])[:, None]
    is_used = (sources >= 0).reshape(*sources.shape, *(1,) * (x.ndim - 2))
    return jnp.where(is_used, x[rows, jnp.maximum(sources, 0)], 0)


def _forward(x: jax.Array, sources: jax.Array, destinations: jax.Array) -> tuple[jax.Array, tuple]:
    return move_rows(x, sources, destinations), (sources, destinations)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    sources, destinations = saved
    no_gradient = (np.zeros(index.shape, jax.dtypes.float0) for index in saved)
    return move_rows(gradient, destinations, sources), *no_gradient


move_rows.defvjp(_forward, _backward)


def invert_rows(sources: jax.Array, size: int) -> jax.Array:
    """The inverse of an index: [B, R] into `size` rows -> [B, size] into R, -1 where no source points."""
    b, r = sources.shape
    # -1 would wrap around; an out-of-range place is dropped.
    places = jnp.where(sources >= 0, sources, size)
    index = jnp.broadcast_to(jnp.arange(r, dtype=jnp.int32), (b, r))
    return jnp.full((b, size), -1, jnp.int32).at[jnp.arange(b)[:, None], places].set(index, mode="drop")
