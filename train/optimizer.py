"""AdamW with warmup and cosine decay, and groups of parameters that are trained in their own way.

Conventions:
- A group is a regular expression that matches the whole dotted path of a parameter; the first that matches decides. A
  parameter in none is trained with the run's own settings.
- What is frozen, by a learning-rate scale of 0 or because it is in a tower that no row has room for, is no argument of
  the loss that is differentiated, counts in no norm of gradients and has no optimizer state.
- Weight decay applies to matrices, embeddings among them, and never to norm scales and other vectors. What a
  parameter is, its own axes say: the leading axis of a scanned stack does not make a matrix of a vector.
- Decay is decoupled and scaled by the learning rate of the group, as in optax.adamw.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import jax
import optax
from flax import nnx

from gemma4_jax.errors import InputError
from gemma4_jax.fields import nearest
from gemma4_jax.run_config import GroupConfig, OptimizerConfig


def dotted(path: tuple) -> str:
    """The path of a parameter as groups match it: decoder.blocks.0.attention.q.kernel."""
    return ".".join(map(str, path))


def group_of(path: tuple, groups: Iterable[GroupConfig]) -> GroupConfig | None:
    """The first group that matches the path of a parameter, if any does."""
    return next((group for group in groups if re.fullmatch(group.pattern, dotted(path))), None)


def split_trained(
    params: nnx.State, optimizer: OptimizerConfig, *, unreached: Collection[str]
) -> tuple[nnx.State, nnx.State]:
    """Parts a model's parameters.

    Args:
      params: all of them, concrete or abstract.
      optimizer: of the run.
      unreached: modules of the model that no document of the run reaches.
    Returns:
      (those that are trained, those that are frozen).
    Raises:
      InputError: a group matches no parameter, or nothing is trained.
    """

    def is_trained(path: tuple, _: object) -> bool:
        group = group_of(path, optimizer.groups)
        return path[0] not in unreached and (group is None or group.learning_rate_scale > 0)

    paths = [dotted(path) for path, _ in nnx.to_flat_state(params)]
    for group in optimizer.groups:
        if not any(re.fullmatch(group.pattern, path) for path in paths):
            raise InputError(
                f"optimizer.groups has {group.pattern!r}, which matches no parameter: it must match a whole dotted "
                f"path, such as {nearest(group.pattern, paths)}."
            )
    trained, frozen = nnx.split_state(params, is_trained, ...)
    if not jax.tree.leaves(trained):
        raise InputError("optimizer.groups freezes every parameter: leave at least one of them to be trained.")
    return trained, frozen


def make_schedule(optimizer: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate by number of steps already taken.

    Linear from nothing to the peak at step `warmup_steps`, then a cosine to its final fraction at step `num_steps`;
    steps count from 1, so that the first has a learning rate above 0.

    Args:
      optimizer: of the run.
      num_steps: of the whole run.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=num_steps,
        end_value=optimizer.learning_rate * optimizer.final_learning_rate_fraction,
    )
    return lambda steps_taken: schedule(steps_taken + 1)


class Optimizer(NamedTuple):
    """An update rule, and the learning rate that it follows by the number of steps already taken."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def make_optimizer(optimizer: OptimizerConfig, num_steps: int) -> Optimizer:
    """AdamW on the trained parameters, gradients first cut to a global norm over all of them.

    Args:
      optimizer: of the run.
      num_steps: of the whole run.
    """
    schedule = make_schedule(optimizer, num_steps)
    transform = optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps),
        optax.stateless(lambda updates, params: _as_groups_say(updates, params, optimizer)),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(transform, schedule)


def _as_groups_say(updates: nnx.State, params: nnx.State, optimizer: OptimizerConfig) -> nnx.State:
    """Updates with the weight decay, and scaled by the learning rate, of each parameter's group."""
    values = dict(nnx.to_flat_state(params))

    def adjust(path: tuple, update: nnx.Variable) -> nnx.Variable:
        group = group_of(path, optimizer.groups) or GroupConfig(pattern=".*")
        decay = optimizer.weight_decay if group.weight_decay is None else group.weight_decay
        value = update.get_value()
        if len(update.get_metadata()["axes"]) >= 2:
            value = value + decay * values[path].get_value()
        return update.replace(value * group.learning_rate_scale)

    return nnx.map_state(adjust, updates)
