"""Supervised training: the cross entropy of the next token, and the load balance of the experts."""

import jax.numpy as jnp

from gemma4_jax.batch import Batch
from gemma4_jax.model import Gemma4
from gemma4_jax.ops.vocabulary_parallel import total_log_prob
from gemma4_jax.run_config import TrainConfig
from gemma4_jax.train.objectives import Mean, Objective


def sft(train: TrainConfig) -> Objective:
    """The objective of pre-training and of supervised fine-tuning.

    Its means: loss, cross entropy in nats over the loss weights; with a z-loss, loss_with_z, which is what is minimised
    in place of it; where there are experts load_balance_loss, over layers, 1 when perfectly even; router_z_loss, over
    layers; and expert_load, [L, E] share of the choices that went to each expert.

    Args:
      train: loss_chunk and the weights of the losses are read; the chunk divides the positions of a row.
    """

    def objective(model: Gemma4, batch: Batch) -> dict[str, Mean]:
        hidden, stats = model.hidden(batch)
        weights, chunk = batch.loss_weights, train.loss_chunk
        z_weight, weight = train.z_loss_weight, jnp.sum(weights)
        total, z_loss = total_log_prob(hidden, model.head, batch.targets, weights, chunk=chunk, z_weight=z_weight)
        means = {"loss": Mean(-total - z_weight * z_loss, weight, coefficient=float(not z_weight))}
        if z_weight:
            means["loss_with_z"] = Mean(-total, weight, coefficient=1.0)
        if stats is not None:
            # Told as the mean over layers, but counted in each: the pull on a router does not depend on the depth.
            num_layers = stats.z_loss.size
            balance, router_z = jnp.mean(stats.load_balance_loss), jnp.mean(stats.z_loss)
            means["load_balance_loss"] = Mean(balance, 1.0, coefficient=num_layers * train.load_balance_weight)
            means["router_z_loss"] = Mean(router_z, 1.0, coefficient=num_layers * train.router_z_weight)
            means["expert_load"] = Mean(stats.load, 1.0)
        return means

    return objective
