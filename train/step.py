"""The two compiled functions of a run: one training step, and one forward pass for evaluation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_jax.batch import Batch
from gemma4_jax.ops.cross_entropy import likeliest_tokens, token_log_probs
from gemma4_jax.sharding import BATCH_AXES, batch_sharding
from gemma4_jax.train.optimizer import make_optimizer, make_schedule, split_trained
from gemma4_jax.train.state import TrainState, shardings_of


class StepMetrics(NamedTuple):
    """What one step measured, replicated on every device.

    Attributes:
      loss: mean cross entropy over loss weights, in nats.
      load_balance_loss: of the experts, mean over layers; 1 when perfectly even, 0 without experts.
      grad_norm: global norm of the gradients of trained parameters, before it is cut.
      param_norm: global norm of all parameters, before the update.
      learning_rate: of a group with scale 1.
      tokens: tokens that are not padding.
      images: images in the batch.
      expert_load: [L, E] share of the choices that went to each expert; None without experts.
      is_sane: whether loss and gradient are numbers, and the update left something of the parameters: one that is
        larger by more than their precision replaces them. After a step that is not sane they are lost.
    """

    loss: jax.Array
    load_balance_loss: jax.Array
    grad_norm: jax.Array
    param_norm: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array
    images: jax.Array
    expert_load: jax.Array | None
    is_sane: jax.Array


class _Losses(NamedTuple):
    """What the forward pass of one piece of a batch gives beside its objective; pieces add up."""

    cross_entropy: jax.Array
    load_balance: jax.Array
    expert_load: jax.Array | None


def make_train_step(graphdef: nnx.GraphDef, state: TrainState, config: Any, mesh: Mesh) -> Any:
    """The jitted training step (state, batch) -> (state, StepMetrics); the state that it is given is donated.

    The objective is the cross entropy summed over the batch, divided by the sum of its loss weights, plus
    `train.load_balance_weight` times the load-balance loss. With `train.grad_accum_steps` > 1 the batch is worked
    through in pieces of every n-th row, so that a row stays on its device: gradients of the cross entropy are those of
    the whole batch; the load-balance loss is not a sum over rows, and is the mean of the pieces' own.

    Args:
      graphdef: the model's structure.
      state: concrete or abstract, for its shardings.
      config: the run config.
      mesh: the device mesh.
    """
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    schedule = make_schedule(config.optimizer, config.train.num_steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        trained, frozen = split_trained(state.params, config.optimizer)

        def objective(trained: nnx.State, piece: Batch, weight_sum: jax.Array) -> tuple[jax.Array, _Losses]:
            model = nnx.merge(graphdef, trained, frozen, state.buffers)
            losses = _losses(model, piece, weight_sum, config.train)
            return losses.cross_entropy + config.train.load_balance_weight * losses.load_balance, losses

        grads, losses = _accumulate(objective, trained, batch, config.train.grad_accum_steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = nnx.merge_state(optax.apply_updates(trained, updates), frozen)
        grad_norm, param_norm = optax.global_norm(grads), optax.global_norm(state.params)
        # It is infinite, or not a number, if any of the new parameters is.
        new_norm = optax.global_norm(params)
        is_kept = new_norm * jnp.finfo(new_norm.dtype).eps < param_norm
        metrics = StepMetrics(
            loss=losses.cross_entropy,
            load_balance_loss=losses.load_balance,
            grad_norm=grad_norm,
            param_norm=param_norm,
            learning_rate=schedule(state.step),
            tokens=jnp.sum(batch.segment_ids > 0),
            images=jnp.sum(jnp.max(batch.patch_image_ids, axis=1, initial=0)),
            expert_load=losses.expert_load,
            is_sane=jnp.isfinite(losses.cross_entropy) & jnp.isfinite(grad_norm) & is_kept,
        )
        return TrainState(state.step + 1, params, state.buffers, opt_state, state.rng), metrics

    shardings = shardings_of(state)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def _losses(model: Any, batch: Batch, weight_sum: jax.Array, train: Any) -> _Losses:
    """Forward pass of a piece of a batch whose loss weights sum to `weight_sum`."""
    hidden, stats = model.hidden(batch)
    log_probs = token_log_probs(hidden, model.head, batch.targets, chunk=train.loss_chunk)
    loss_sum = -jnp.sum(log_probs * batch.loss_weights)
    share = 1 / train.grad_accum_steps
    if stats is None:
        return _Losses(loss_sum / weight_sum, jnp.zeros(()), None)
    return _Losses(loss_sum / weight_sum, jnp.mean(stats.load_balance_loss) * share, stats.load * share)


def _accumulate(objective: Any, trained: nnx.State, batch: Batch, num_pieces: int) -> tuple[nnx.State, _Losses]:
    """Gradients of the objective summed over the pieces of a batch, and its losses summed likewise."""
    # A batch without any loss weight has no gradient, rather than one that is not a number.
    weight_sum = jnp.sum(batch.loss_weights)
    weight_sum = jnp.where(weight_sum > 0, weight_sum, 1)

    def gradients(piece: Batch) -> tuple[nnx.State, _Losses]:
        return jax.grad(objective, has_aux=True)(trained, piece, weight_sum)

    if num_pieces == 1:
        return gradients(batch)

    def cut(x: jax.Array) -> jax.Array:
        # No -1: what is left out of a batch, such as its images, is an array of size 0.
        pieces = jnp.swapaxes(x.reshape(x.shape[0] // num_pieces, num_pieces, *x.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(pieces, P(None, BATCH_AXES))

    def add(total: Any, piece: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(piece)), None

    pieces = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, pieces)[0]


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


def make_eval_step(graphdef: nnx.GraphDef, state: TrainState, config: Any, mesh: Mesh) -> Any:
    """The jitted forward pass (params, buffers, batch) -> EvalOutput. Arguments as in `make_train_step`."""

    def eval_step(params: nnx.State, buffers: nnx.State, batch: Batch) -> EvalOutput:
        model = nnx.merge(graphdef, params, buffers)
        hidden, _ = model.hidden(batch)
        chunk = config.train.loss_chunk
        log_probs = token_log_probs(hidden, model.head, batch.targets, chunk=chunk)
        loss_sum = -jnp.sum(log_probs * batch.loss_weights)
        greedy = likeliest_tokens(hidden, model.head, chunk=chunk)
        return EvalOutput(loss_sum, jnp.sum(batch.loss_weights), greedy)

    shardings = shardings_of(state)
    return jax.jit(
        eval_step,
        in_shardings=(shardings.params, shardings.buffers, batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, P()),
    )
