"""The mixture of experts that stands beside the dense MLP: router, experts and the norms around them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma4_jax.config import TextConfig
from gemma4_jax.layers import RMSNorm, constant_param, normal_param, rms_normalize, weight
from gemma4_jax.ops.expert_parallel import ExpertPlan, apply_experts
from gemma4_jax.ops.matmul import contract, value


class RouterStats(NamedTuple):
    """How tokens were spread over experts, global over the batch, padding left out.

    Attributes:
      load: [..., E] share of all choices that went to each expert; sums to 1. Not a number where a score is none.
      load_balance_loss: [...] E * sum_e load_e * mean router probability_e; 1 when perfectly even.
      z_loss: [...] mean squared log-sum-exp of the router's scores. Source: Zoph et al. 2022 (arXiv:2202.08906).
    """

    load: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array


class Router(nnx.Module):
    """Chooses C experts for each token, in float32. Source: docs/gemma4.md section 2, "MoE layer"."""

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, param_dtype: jnp.dtype):
        self.num_choices = config.num_experts_per_token
        self.eps = config.norm_eps
        self.scale = constant_param({"embed": config.embed_dim}, param_dtype)
        self.per_expert_scale = constant_param({"expert": config.num_experts}, param_dtype)
        # What it is multiplied with has a norm of about one, not entries of about one.
        self.kernel = normal_param(
            rngs, {"embed": config.embed_dim, "expert_score": config.num_experts}, param_dtype, stddev=1.0
        )

    @jax.named_scope("router")
    def __call__(self, x: jax.Array, is_token: jax.Array) -> tuple[jax.Array, jax.Array, RouterStats]:
        """Routes.

        Args:
          x: [B, T, D], the residual stream itself, not normalised.
          is_token: [B, T] bool, False on padding, which does not count in the statistics.
        Returns:
          (expert index [B, T, C] int32, weight [B, T, C] float32, statistics).
        """
        u = rms_normalize(x, self.eps) * self.scale[...].astype(jnp.float32) * x.shape[-1] ** -0.5
        scores = contract(u, weight(self, "kernel"), 1)
        probabilities = jax.nn.softmax(scores, axis=-1)
        _, choices = jax.lax.top_k(jax.lax.stop_gradient(probabilities), self.num_choices)
        choices = checkpoint_name(choices, "routed")
        top = jnp.take_along_axis(probabilities, choices, axis=-1)
        weights = top / jnp.sum(top, axis=-1, keepdims=True)
        weights *= self.per_expert_scale[...].astype(jnp.float32)[choices]
        return choices, weights, _router_stats(scores, probabilities, choices, is_token)


def _router_stats(scores: jax.Array, probabilities: jax.Array, choices: jax.Array, is_token: jax.Array) -> RouterStats:
    num_experts = probabilities.shape[-1]
    count = jnp.maximum(jnp.sum(is_token), 1)
    token_weight = is_token[..., None].astype(jnp.float32)
    chosen = jnp.sum(jax.nn.one_hot(choices, num_experts), axis=2)
    load = jnp.sum(chosen * token_weight, axis=(0, 1)) / (count * choices.shape[-1])
    probability = jnp.sum(probabilities * token_weight, axis=(0, 1)) / count
    z_loss = jnp.sum(jax.nn.logsumexp(scores, axis=-1) ** 2 * is_token) / count
    load = jnp.where(jnp.isfinite(z_loss), load, jnp.nan)
    return RouterStats(load, num_experts * jnp.sum(load * probability), z_loss)


class Experts(nnx.Module):
    """The stacked weights of all experts of one layer; gate and up are the two halves of one projection."""

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, param_dtype: jnp.dtype):
        expert, embed, mlp = {"expert": config.num_experts}, {"embed": config.embed_dim}, {"mlp": config.expert_dim}
        self.gate_up = normal_param(
            rngs, expert | embed | {"gate_and_up": 2} | mlp, param_dtype, stddev=config.embed_dim**-0.5
        )
        self.down = normal_param(rngs, expert | mlp | embed, param_dtype, stddev=config.expert_dim**-0.5)

    @jax.named_scope("experts")
    def __call__(
        self, x: jax.Array, choices: jax.Array, weights: jax.Array, is_token: jax.Array, plan: ExpertPlan
    ) -> jax.Array:
        gate_up, down = value(weight(self, "gate_up")), value(weight(self, "down"))
        return apply_experts(x, choices, weights, gate_up, down, is_token=is_token, **plan._asdict())


class MixtureOfExperts(nnx.Module):
    """Sum of the dense branch and the experts' branch of a layer, before the layer's last norm."""

    def __init__(self, rngs: nnx.Rngs, config: TextConfig, *, param_dtype: jnp.dtype):
        def norm() -> RMSNorm:
            return RMSNorm({"embed": config.embed_dim}, eps=config.norm_eps, param_dtype=param_dtype)

        self.router = Router(rngs, config, param_dtype=param_dtype)
        self.experts = Experts(rngs, config, param_dtype=param_dtype)
        self.pre_norm = norm()
        self.dense_post_norm = norm()
        self.post_norm = norm()

    def __call__(
        self, residual: jax.Array, dense: jax.Array, is_token: jax.Array, plan: ExpertPlan
    ) -> tuple[jax.Array, RouterStats]:
        """Combines.

        Args:
          residual: [B, T, D], what the layer's MLP branch started from.
          dense: [B, T, D], output of the dense MLP.
          is_token: [B, T] bool, False on padding.
          plan: how the experts are computed.
        """
        choices, weights, stats = self.router(residual, is_token)
        sparse = self.experts(self.pre_norm(residual), choices, weights, is_token, plan)
        return self.dense_post_norm(dense) + self.post_norm(sparse), stats
