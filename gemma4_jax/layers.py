"""The few modules that text, vision and audio share, and how a module holds its arrays."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.ops.matmul import Matrix, contract


class Buffer(nnx.Variable):
    """An array that belongs to the model and its checkpoints but is never trained."""


def normal_param(rngs: nnx.Rngs, axes: dict[str, int], dtype: jnp.dtype, *, stddev: float) -> nnx.Param:
    """A parameter drawn from a normal distribution of mean 0.

    Args:
      rngs: source of randomness, stream "params".
      axes: logical axis name -> size, in order.
      dtype: dtype in which it is stored.
      stddev: standard deviation, chosen so that what the parameter computes starts with a variance of about one.
    """
    value = stddev * jax.random.normal(rngs.params(), tuple(axes.values()), dtype)
    return nnx.Param(value, axes=tuple(axes))


def constant_param(axes: dict[str, int], dtype: jnp.dtype, value: float = 1.0) -> nnx.Param:
    """A parameter that starts at one value everywhere; `axes` as in `normal_param`."""
    return nnx.Param(jnp.full(tuple(axes.values()), value, dtype), axes=tuple(axes))


def weight(module: nnx.Module, name: str) -> Matrix:
    """The matrix that a module holds under a name, for the products of `ops.matmul`.

    It is the value of the parameter of that name, or what the adapter beside it makes of that value: an attribute
    `<name>_adapter`, a module of whoever adapts the model, which is called with the value and returns the matrix to
    use. The parameter itself keeps its path and its axes; the adapter's own lie beside it, such as
    `q.kernel_adapter.a`, and are stacked, scanned, sharded, frozen or trained as those of any module.
    """
    stored = getattr(module, name).get_value()
    adapter = getattr(module, f"{name}_adapter", None)
    return stored if adapter is None else adapter(stored)


def gelu(x: jax.Array) -> jax.Array:
    """GELU, tanh approximation: of the MLPs and per-layer gates of the decoder and the MLPs of the vision tower.

    The audio tower has SiLU in its place.

    Its factor (1 + tanh u) / 2 is written as sigmoid(2 u): the sum keeps no digits of what is nearly zero.
    """
    return x * jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """x divided by its root mean square over the last axis, computed and returned in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """RMS normalisation with a plain weight (not 1 + weight), in float32. Source: docs/gemma4.md section 2.

    Args of the constructor:
      axes: the normalised axis, its logical name -> size.
      initial_scale: what the weight starts from. Norms that stand after a branch make its output as large as they
        say, whatever the branch computes: at one, branches of random weights would drown the residual stream.
    """

    def __init__(self, axes: dict[str, int], *, eps: float, param_dtype: jnp.dtype, initial_scale: float = 1.0):
        self.scale = constant_param(axes, param_dtype, initial_scale)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return _scaled_norm(x, self.scale[...], self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scaled_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return _scaled_norm_forward(x, scale, eps)[0]


def _scaled_norm_forward(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, tuple]:
    # Of a norm the backward pass needs its input and one number a row; left to themselves, gradients keep a float32
    # copy of the row for every factor.
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1) + eps)
    return (wide * inverse[..., None] * scale.astype(jnp.float32)).astype(x.dtype), (x, scale, inverse)


def _scaled_norm_backward(eps: float, saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, inverse = saved
    wide, of_out, factor = (array.astype(jnp.float32) for array in (x, gradient, scale))
    # Both sums over this are matmuls: as sums they take the CPU backend many times as long as the rest of the step.
    product = of_out * wide
    tensordot = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)
    projection = tensordot(product, factor / x.shape[-1], 1) * inverse**3
    of_x = of_out * factor * inverse[..., None] - wide * projection[..., None]
    return of_x.astype(x.dtype), tensordot(inverse, product, x.ndim - 1).astype(scale.dtype)


_scaled_norm.defvjp(_scaled_norm_forward, _scaled_norm_backward)


class Linear(nnx.Module):
    """A linear map without bias from the last axes of x to new ones.

    Args of the constructor:
      inputs, outputs: logical axis name -> size; the kernel is [*inputs, *outputs].
      is_clipped: clamp input and output to four stored scalars, infinite at first (docs/gemma4.md section 3, "Layers").
      gain: standard deviation of the output at first, for inputs of one.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        param_dtype: jnp.dtype,
        is_clipped: bool = False,
        gain: float = 1.0,
    ):
        self.num_inputs = len(inputs)
        self.is_clipped = is_clipped
        fan_in = math.prod(inputs.values())
        self.kernel = normal_param(rngs, inputs | outputs, param_dtype, stddev=gain * fan_in**-0.5)
        if is_clipped:
            self.input_min = Buffer(jnp.array(-jnp.inf, param_dtype), axes=())
            self.input_max = Buffer(jnp.array(jnp.inf, param_dtype), axes=())
            self.output_min = Buffer(jnp.array(-jnp.inf, param_dtype), axes=())
            self.output_max = Buffer(jnp.array(jnp.inf, param_dtype), axes=())

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *inputs] -> [..., *outputs], in x's dtype."""
        if self.is_clipped:
            x = _clip(x, self.input_min[...], self.input_max[...])
        x = contract(x, weight(self, "kernel"), self.num_inputs)
        if self.is_clipped:
            x = _clip(x, self.output_min[...], self.output_max[...])
        return x


def _clip(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    # Unlike jnp.clip, a value that equals a bound passes its whole gradient, as in the reference.
    low, high = low.astype(x.dtype), high.astype(x.dtype)
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


class GatedMLP(nnx.Module):
    """down(gelu(gate x) * up x), the MLP of decoder and vision tower. Source: docs/gemma4.md sections 2 and 3.

    Args of the constructor:
      narrow, wide: the axis outside and the one inside, logical name -> size.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        narrow: dict[str, int],
        wide: dict[str, int],
        *,
        param_dtype: jnp.dtype,
        is_clipped: bool = False,
    ):
        self.gate = Linear(rngs, narrow, wide, param_dtype=param_dtype, is_clipped=is_clipped)
        self.up = Linear(rngs, narrow, wide, param_dtype=param_dtype, is_clipped=is_clipped)
        self.down = Linear(rngs, wide, narrow, param_dtype=param_dtype, is_clipped=is_clipped)

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        # Of the wide arrays the backward pass keeps two: it makes gelu and product again, which costs no matmul. There
        # are no barriers, behind which a mesh would gather the weight of `down` another time.
        rest = jax.checkpoint(lambda gate, up: self.down(gelu(gate) * up), prevent_cse=False)
        return rest(self.gate(x), self.up(x))
