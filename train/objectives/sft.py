"""Supervised training: the cross entropy of the next token, and the load balance of the experts."""

import jax.numpy as jnp

from gemma4_jax.batch import Batch
from gemma4_jax.model import Gemma4
from gemma4_jax.ops.cross_entropy import total_log_prob
from gemma4_jax.run_config import TrainConfig
from gemma4_jax.train.objectives import Mean, Objective


def sft(train: TrainConfig) -> Objective:
    """The objective of pre-training and of supervised fine-tuning.

    Its means: loss, cross entropy in nats over the loss weights; where there are experts load_balance_loss, over
    layers, 1 when perfectly even; router_z_loss, over layers; and expert_load, [L, E] share of the choices that went to
    each expert.

    Args:
      train: loss_chunk, load_balance_weight and router_z_weight are read; the chunk divides the positions of a row.
    """

    def objective(model: Gemma4, batch: Batch) -> dict[str, Mean]:
        hidden, stats = model.hidden(batch)
        weights, chunk = batch.loss_weights, train.loss_chunk
        loss = -total_log_prob(hidden, model.head, batch.targets, weights, chunk=chunk)
        means = {"loss": Mean(loss, jnp.sum(weights), coefficient=1.0)}
        if stats is not None:
            balance = jnp.mean(stats.load_balance_loss)
            means["load_balance_loss"] = Mean(balance, 1.0, coefficient=train.load_balance_weight)
            means["router_z_loss"] = Mean(jnp.mean(stats.z_loss), 1.0, coefficient=train.router_z_weight)
            means["expert_load"] = Mean(stats.load, 1.0)
        return means

    return objective
