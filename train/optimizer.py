"""AdamW with warmup and cosine decay, and a learning rate for each group of parameters.

Conventions:
- Groups: "vision" is the vision tower and the projection of its soft tokens; "embedding" is the table of tokens (tied
  to the head) and the table of per-layer embeddings; "decoder" is everything else, but for the audio tower: no source
  gives documents with sounds, so it could only decay, and is frozen.
- A group whose learning-rate scale is 0 is frozen: it is no argument of the loss that is differentiated, counts in no
  norm and has no optimizer state.
- Weight decay applies to matrices, embeddings among them, and never to norm scales and other vectors. What a
  parameter is, its own axes say: the leading axis of a scanned stack does not make a matrix of a vector.
- Decay is decoupled and scaled by the learning rate of the group, as in optax.adamw.
"""

from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

GROUPS = ("vision", "embedding", "decoder")
"""Groups of parameters with a learning rate of their own."""

_EMBEDDING_TABLES = (("embedder", "table"), ("per_layer_embedder", "table"))


def group_of(path: tuple) -> str | None:
    """The group, one of GROUPS, of the parameter at a path of the model; None for one that is never trained."""
    if path[0] in ("audio", "audio_projection"):
        return None
    if path[0] in ("vision", "image_projection"):
        return "vision"
    return "embedding" if path in _EMBEDDING_TABLES else "decoder"


def split_trained(params: nnx.State, optimizer: Any) -> tuple[nnx.State, nnx.State]:
    """Parts a model's parameters.

    Args:
      params: all of them, concrete or abstract.
      optimizer: `config.optimizer` of the run.
    Returns:
      (those that are trained, those of frozen groups).
    """

    def is_trained(path: tuple, _: Any) -> bool:
        group = group_of(path)
        return group is not None and optimizer.learning_rate_scale[group] > 0

    trained, frozen = nnx.split_state(params, is_trained, ...)
    return trained, frozen


def make_schedule(optimizer: Any, num_steps: int) -> optax.Schedule:
    """The learning rate by number of steps already taken.

    Linear from nothing to the peak at step `warmup_steps`, then a cosine to its final fraction at step `num_steps`;
    steps count from 1, so that the first has a learning rate above 0.

    Args:
      optimizer: `config.optimizer` of the run.
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


def make_optimizer(optimizer: Any, num_steps: int) -> Optimizer:
    """AdamW on the trained parameters, gradients first cut to a global norm over all of them.

    Args:
      optimizer: `config.optimizer` of the run.
      num_steps: of the whole run.
    """
    schedule = make_schedule(optimizer, num_steps)
    transform = optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decay_mask),
        optax.stateless(lambda updates, params: _scale_groups(updates, optimizer.learning_rate_scale)),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(transform, schedule)


def decay_mask(params: nnx.State) -> nnx.State:
    """For each parameter whether weight decay applies: it does where it has two axes or more of its own."""
    return nnx.map_state(lambda _, param: param.replace(len(param.get_metadata()["axes"]) >= 2), params)


def _scale_groups(updates: nnx.State, scales: Any) -> nnx.State:
    def scale(path: tuple, update: nnx.Variable) -> nnx.Variable:
        return jax.tree.map(lambda value: value * scales[group_of(path)], update)

    return nnx.map_state(scale, updates)
