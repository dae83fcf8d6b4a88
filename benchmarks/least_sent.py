"""The least that a device sends in one training step of a model with experts, on paper.

What is counted is what a step of this kind cannot do without: parameters spread over `fsdp`, experts also over
`expert`, rows of a batch over all axes, remat "full", and tokens that are gathered to the experts. Each thing is sent
once for each time that it is needed, in bfloat16, but for the gradient of the vocabulary, whose sum is float32. What
attention exchanges over `context` is not counted, nor are norms and scalars; `tensor` is not foreseen.
"""

import math
from collections import Counter
from typing import Any

PARTS = ("experts' weights", "tokens to experts", "dense weights", "vocabulary")

HALF, FLOAT = 2, 4
AXES = ("data", "fsdp", "expert", "context")


def least_sent(program: Any) -> dict[str, Counter[str]]:
    """Part of the step -> kind of collective -> bytes that a device sends, at the least.

    Args:
      program: `gemma4_jax.train.program.Program`, of a model with experts, on a mesh without `tensor`.
    """
    from flax import nnx

    mesh, config = dict(program.mesh.shape), program.config
    text = config.model.text
    num_tokens = config.data.batch_size * config.data.seq_len // math.prod(mesh[axis] for axis in AXES)
    least: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    least["tokens to experts"] = of_tokens(num_tokens, text, mesh["expert"])
    least["vocabulary"] = of_vocabulary(num_tokens, text, mesh)
    for state, is_trained in ((program.state.trained, True), (program.state.frozen, False)):
        for path, variable in nnx.to_flat_state(state):
            array = variable.get_value()
            if "fsdp" in array.sharding.spec and path[0] != "embedder":
                part = "experts' weights" if "experts" in path else "dense weights"
                least[part] += of_weight(array, mesh, is_trained, config.train.grad_accum_steps)
    return least


def of_weight(array: Any, mesh: dict[str, int], is_trained: bool, microbatches: int) -> Counter[str]:
    """Of a weight, which is made whole over `fsdp` in the forward pass and in the backward pass, which makes what it
    needs of the forward pass again; a frozen one, of a tower that is frozen as a whole, in the first alone. Its
    gradient is added up in the part that a device has."""
    part = HALF * math.prod(array.sharding.shard_shape(array.shape))
    copies = math.prod(mesh[axis] for axis in AXES if axis not in array.sharding.spec)
    others = mesh["fsdp"] - 1
    if not is_trained:
        return Counter({"all-gather": microbatches * part * others})
    return Counter(
        {
            "all-gather": 2 * microbatches * part * others,
            "reduce-scatter": part * others,
            "all-reduce": round(part * all_reduced(copies)),
        }
    )


def of_tokens(num_tokens: int, text: Any, shards: int) -> Counter[str]:
    """Of the tokens that a device has, over all layers. Each, with its choices and their weights, goes to the other
    devices of `expert` in the forward pass, and again in the backward pass, together with its gradient. The experts'
    sums come back, and so do the gradients of the token and of its weights."""
    token, choices = HALF * text.embed_dim, FLOAT * text.num_experts_per_token
    weights = FLOAT * text.num_experts_per_token
    times = num_tokens * (shards - 1) * text.num_layers
    there, back = 2 * (token + choices + weights) + token, token + token + weights
    return Counter({"all-gather": times * there, "reduce-scatter": times * back})


def of_vocabulary(num_tokens: int, text: Any, mesh: dict[str, int]) -> Counter[str]:
    """Of the table, as `ops.lookup` and `ops.vocabulary_parallel` spread it: rows that are looked up go home, and so do
    their gradients; the loss has another part of the table on each device, and brings all final hidden states to it."""
    fsdp = mesh["fsdp"]
    copies = math.prod(mesh[axis] for axis in AXES if axis != "fsdp")
    part, hidden = text.vocab_size * text.embed_dim // fsdp, HALF * num_tokens * text.embed_dim
    return Counter(
        {
            "all-gather": hidden * (fsdp - 1),
            "reduce-scatter": hidden * (fsdp - 1),
            "all-to-all": (2 * hidden + (HALF + FLOAT) * part) * (fsdp - 1) // fsdp,
            "all-reduce": round(FLOAT * part * all_reduced(copies)),
        }
    )


def all_reduced(devices: int) -> float:
    """Times that each of so many devices sends what it adds up with the others."""
    return 2 * (devices - 1) / devices
