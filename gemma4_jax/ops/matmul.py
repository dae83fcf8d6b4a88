"""Where a weight meets x: products with a matrix, and rows of it, whatever it is stored as.

A matrix is a plain array, or a `StoredMatrix`: a low-rank sum, a quantised array, whatever else can say its values.
Nothing outside of `ops` multiplies with a weight otherwise, so a new kind of matrix works everywhere at once.
"""

import abc
import math

import jax
import jax.numpy as jnp

from gemma4_jax.ops.lookup import look_up


class StoredMatrix(abc.ABC):
    """A matrix that is stored as something other than its values.

    A kind of one is a pytree: a frozen dataclass under `jax.tree_util.register_dataclass`, say. It states its values;
    products are made of these, unless it overrides them because it knows a shorter way. Which kind a matrix is, is
    known when a function is traced, so the choice costs nothing once it is compiled.
    """

    @abc.abstractmethod
    def value(self) -> jax.Array:
        """The dense array, in the dtype that it stands for."""

    def contract(self, x: jax.Array, num_inputs: int) -> jax.Array:
        """As the function of this name."""
        return contract(x, self.value(), num_inputs)

    def take(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """As the function of this name."""
        return take(self.value(), ids, dtype)


Matrix = jax.Array | StoredMatrix


def value(matrix: Matrix) -> jax.Array:
    """The dense array that a matrix stands for."""
    return matrix.value() if isinstance(matrix, StoredMatrix) else matrix


def contract(x: jax.Array, matrix: Matrix, num_inputs: int) -> jax.Array:
    """The last axes of x with the first of a matrix, in x's dtype.

    Args:
      x: [..., *inputs].
      matrix: [*inputs, *outputs], cast to x's dtype.
      num_inputs: number of axes that are contracted.
    Returns:
      [..., *outputs].
    """
    if isinstance(matrix, StoredMatrix):
        return matrix.contract(x, num_inputs)
    matrix = matrix.astype(x.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    # Where the length is spread over `context`, rows and length cannot become one axis.
    if not mesh.empty and mesh.shape["context"] > 1:
        return jnp.tensordot(x, matrix, axes=num_inputs)
    # One matrix product, if it can be: the gradient of a contraction over two axes of tokens makes the CPU backend
    # transpose both operands; over one axis it does not.
    outputs = matrix.shape[num_inputs:]
    flat = matrix.reshape(-1, math.prod(outputs))
    return (x.reshape(-1, flat.shape[0]) @ flat).reshape(*x.shape[: x.ndim - num_inputs], *outputs)


def take(table: Matrix, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding table: [V, ...] by ids [...] -> [*ids, ...] in `dtype`."""
    if isinstance(table, StoredMatrix):
        return table.take(ids, dtype)
    return look_up(table, ids, dtype)
