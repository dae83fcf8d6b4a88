"""Layers of one shape as one stack: built together, and run one after another by a scan.

A stack is traced and compiled once, whatever its depth.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

_OF_EXPERTS = "routed", "exchanged"

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*_OF_EXPERTS),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names("attended", *_OF_EXPERTS),
    "full": jax.checkpoint_policies.save_only_these_names(*_OF_EXPERTS),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["routed"],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What a stack keeps of a layer for the backward pass beside its input: everything, results of weight matmuls, those of
attention, or nothing; "offload" keeps nothing, and moves the input to the memory of the host. Which expert a token went
to, all of them keep: it is small, and is decided once. What experts of other devices made of the tokens, all but
"offload" keep: it is as large as the input, and would else travel again, from each device that shares the experts."""


def remat(step: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """A step of a stack, of which the backward pass has what a policy keeps, and computes the rest again.

    Args:
      step: (carry, *rest) -> anything.
      policy: a key of `REMAT_POLICIES`.
    """
    if policy == "none":
        return step

    def named_step(carry: Any, *rest: Any) -> Any:
        return step(jax.tree.map(lambda x: checkpoint_name(x, "residual"), carry), *rest)

    # Its barriers make what is computed again wait for its gradient: without them the compiler computes several layers
    # of a period again before it needs the first of them.
    return jax.checkpoint(named_step, policy=REMAT_POLICIES[policy], prevent_cse=True)


def stack_modules(build: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs, count: int) -> nnx.Module:
    """`count` modules of one shape as one module whose arrays have a leading "layers" axis."""
    return nnx.vmap(lambda key: build(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), count))


def run_stack(
    stack: nnx.Module,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any = None,
    *,
    remat_policy: str,
) -> tuple[Any, Any]:
    """Runs the modules of a stack one after another.

    Args:
      stack: of `stack_modules`.
      step: what one of them does, (module, carry, its inputs) -> (carry, its outputs).
      carry: what goes from one to the next: the residual stream, and what else has one shape for all.
      inputs: what each has of its own; arrays with a leading "layers" axis.
      remat_policy: what is kept of a step for the backward pass, a key of `REMAT_POLICIES`.
    Returns:
      (carry behind the last, outputs with a leading "layers" axis).
    """
    graphdef, state = nnx.split(stack)

    def scanned_step(carry: Any, scanned: tuple[nnx.State, Any]) -> tuple[Any, Any]:
        state, inputs = scanned
        return step(nnx.merge(graphdef, state), carry, inputs)

    with jax.named_scope("layers"):
        return jax.lax.scan(remat(scanned_step, remat_policy), carry, (state, inputs))
