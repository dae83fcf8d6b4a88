"""The two compiled functions of a run: one training step, and one forward pass for evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_jax.batch import Batch
from gemma4_jax.ops.cross_entropy import likeliest_tokens, token_log_probs
from gemma4_jax.sharding import BATCH_AXES, batch_sharding
from gemma4_jax.train.objectives import Mean, Objective
from gemma4_jax.train.optimizer import Optimizer
from gemma4_jax.train.state import TrainState


class StepMetrics(NamedTuple):
    """What one step measured, replicated on every device.

    Attributes:
      means: those of the objective, by name.
      grad_norm: global norm of the gradients of trained parameters, before it is cut.
      param_norm: global norm of all parameters, before the update.
      learning_rate: of a group with scale 1.
      tokens: tokens that are not padding.
      images: images in the batch.
      is_sane: whether loss and gradient are numbers, and the update left something of the parameters: one that is
        larger by more than their precision replaces them. After a step that is not sane they are lost.
    """

    means: dict[str, jax.Array]
    grad_norm: jax.Array
    param_norm: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array
    images: jax.Array
    is_sane: jax.Array


def make_train_step(
    graphdef: nnx.GraphDef, objective: Objective, optimizer: Optimizer, shardings: TrainState, *, microbatches: int
) -> Any:
    """The jitted training step (state, batch) -> (state, StepMetrics); the state that it is given is donated.

    It minimises the sum of the objective's means, each times its coefficient. The batch is split into microbatches by
    striding over its rows, so that a row stays on its device.

    Args:
      graphdef: the model's structure.
      objective: of the run.
      optimizer: of its trained parameters.
      shardings: of the state.
      microbatches: forward and backward passes whose gradients are accumulated; they divide the rows of a device.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        def means_of(trained: nnx.State, microbatch: Batch) -> dict[str, Mean]:
            return objective(nnx.merge(graphdef, trained, state.frozen), microbatch)

        grads, means = _accumulate(means_of, state.trained, batch, microbatches)
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        grad_norm = optax.global_norm(grads)
        param_norm, new_norm = (
            optax.global_norm(nnx.filter_state(nnx.merge_state(params, state.frozen), nnx.Param))
            for params in (state.trained, trained)
        )
        # It is infinite, or not a number, if any of the new parameters is.
        is_kept = new_norm * jnp.finfo(new_norm.dtype).eps < param_norm
        metrics = StepMetrics(
            means=means,
            grad_norm=grad_norm,
            param_norm=param_norm,
            learning_rate=optimizer.schedule(state.step),
            tokens=jnp.sum(batch.segment_ids > 0),
            images=jnp.sum(jnp.max(batch.patch_image_ids, axis=1, initial=0)),
            is_sane=jnp.isfinite(means["loss"]) & jnp.isfinite(grad_norm) & is_kept,
        )
        return TrainState(state.step + 1, trained, state.frozen, opt_state), metrics

    mesh = cast(Mesh, cast(NamedSharding, shardings.step).mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def _accumulate(
    means_of: Callable[[nnx.State, Batch], dict[str, Mean]], trained: nnx.State, batch: Batch, microbatches: int
) -> tuple[nnx.State, dict[str, jax.Array]]:
    """Gradients of what the means add up to, and the means, over all microbatches of a batch."""

    def gradients(microbatch: Batch, weights: dict[str, Any] | None) -> tuple[nnx.State, dict[str, jax.Array]]:
        def minimised(trained: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
            means = means_of(trained, microbatch)
            shares = {
                name: mean.total / _nonzero(mean.weight if weights is None else weights[name])
                for name, mean in means.items()
            }
            counted = [mean.coefficient * shares[name] for name, mean in means.items() if mean.coefficient]
            return sum(counted[1:], counted[0]), shares

        return jax.grad(minimised, has_aux=True)(trained)

    if microbatches == 1:
        return gradients(batch, None)

    def split(x: jax.Array) -> jax.Array:
        # No -1: what is left out of a batch, such as its images, is an array of size 0.
        strided = jnp.swapaxes(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(strided, P(None, BATCH_AXES))

    def total(function: Callable[[Batch], Any]) -> Any:
        first = jax.tree.map(lambda x: x[0], stacked)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first))
        return jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, function(x)), None), zeros, stacked)[0]

    stacked = jax.tree.map(split, batch)
    # The weights of all microbatches, before the first is differentiated. What else the objective computes for them is
    # not used, and so not compiled.
    weights = {
        name: mean.weight * microbatches if isinstance(mean.weight, float) else mean.weight
        for name, mean in means_of(trained, batch).items()
    }
    return total(lambda microbatch: gradients(microbatch, weights))


def _nonzero(weight: Any) -> Any:
    """1 for a weight of 0: a batch without any has no gradient, rather than one that is not a number."""
    return jnp.where(weight > 0, weight, 1)


class EvalOutput(NamedTuple):
    """What one forward pass over a held-out batch gives, replicated on every device.

    Attributes:
      loss_sum: sum of weighted losses, in nats.
      weight_sum: sum of loss weights.
      greedy: [B, T] int32, the likeliest token after each position.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array
    greedy: jax.Array


def make_eval_step(graphdef: nnx.GraphDef, shardings: TrainState, *, chunk: int) -> Any:
    """The jitted forward pass (trained, frozen, batch) -> EvalOutput.

    Args:
      graphdef: the model's structure.
      shardings: of the state.
      chunk: positions of a row whose logits exist at one time; divides its length.
    """

    def eval_step(trained: nnx.State, frozen: nnx.State, batch: Batch) -> EvalOutput:
        model = nnx.merge(graphdef, trained, frozen)
        hidden, _ = model.hidden(batch)
        log_probs = token_log_probs(hidden, model.head, batch.targets, chunk=chunk)
        loss_sum = -jnp.sum(log_probs * batch.loss_weights)
        return EvalOutput(loss_sum, jnp.sum(batch.loss_weights), likeliest_tokens(hidden, model.head, chunk=chunk))

    mesh = cast(Mesh, cast(NamedSharding, shardings.step).mesh)
    return jax.jit(
        eval_step,
        in_shardings=(shardings.trained, shardings.frozen, batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, P()),
    )
