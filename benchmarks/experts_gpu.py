"""A layer of experts on a GPU, beside a plain matmul and torch's grouped_mm.

  pip install ".[mosaic_gpu]" torch
  export XLA_PYTHON_CLIENT_PREALLOCATE=false      # or jax leaves no memory to torch
  python benchmarks/experts_gpu.py [--experts 128 16]     # those of 26B-A4B on one device, and on one of eight

Written without a GPU at hand: none has run it. Prints TFLOP/s of a layer of 26B-A4B, forward and backward in bfloat16,
choices random, with only the three products counted, and what share that is of the rate of one plain matmul as large
as the first product, measured before each. The time is the layer's: rows are gathered and added up too. Of ours it
prints too how far the output and the four gradients are from those of `blocks`, the farthest, in parts of its norm: in
bfloat16 that is below 0.01 where both are right.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_gpu import seconds

from gemma4_jax.errors import InputError, reason_of
from gemma4_jax.ops.expert_parallel import apply_experts, choose
from gemma4_jax.ops.policy import KernelPolicy


def plain_matmul(rows: int, dim: int, width: int) -> Callable[[], Any]:
    """[rows, dim] x [dim, width]."""
    a, b = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate([(rows, dim), (dim, width)])
    )
    multiply = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(multiply(a, b))


def ours(name: str, choices: np.ndarray, experts: int, dim: int, width: int) -> Callable[[], Any]:
    """Forward and backward of an implementation."""
    implementation = choose(KernelPolicy(jax.devices()[0].platform, experts=name)).implementation
    tokens, chosen = choices.shape
    shapes = (1, tokens, dim), (1, tokens, chosen), (experts, dim, 2, width), (experts, width, dim), (1, tokens, dim)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    inputs = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    inputs[1], inputs[2] = inputs[1].astype(jnp.float32), inputs[2] * dim**-0.5

    @jax.jit
    def gradient(
        x: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, direction: jax.Array, choices: jax.Array
    ) -> tuple:
        layer = lambda *inputs: apply_experts(inputs[0], choices, *inputs[1:], implementation=implementation)  # noqa: E731
        out, pull = jax.vjp(layer, x, weights, gate_up, down)
        return out, pull(direction)

    on_device = jnp.asarray(choices)[None]
    return lambda: jax.block_until_ready(gradient(*inputs, on_device))


def of_torch(choices: np.ndarray, experts: int, dim: int, width: int) -> Callable[[], Any]:
    """The same by torch, on its GPU if it has one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, chosen = choices.shape
    shapes = (tokens, dim), (tokens, chosen), (experts, dim, 2 * width), (experts, width, dim)
    x, weights, gate_up, down = (
        torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for shape in shapes
    )
    flat, direction = torch.tensor(choices, device=device).reshape(-1), torch.randn_like(x)

    def step() -> None:
        order = torch.argsort(flat, stable=True)
        ends = torch.cumsum(torch.bincount(flat, minlength=experts), 0, dtype=torch.int32)
        token = order // chosen
        gate, up = torch._grouped_mm(x[token], gate_up, offs=ends).chunk(2, dim=-1)
        hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
        out = torch._grouped_mm(hidden, down, offs=ends) * weights.reshape(-1)[order][:, None]
        out = torch.zeros_like(x).index_add(0, token, out)
        torch.autograd.grad(out, (x, weights, gate_up, down), direction)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def difference(given: Any, expected: Any) -> float:
    """Of arrays from arrays, in parts of the norm, the largest."""
    pairs = zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True)
    pairs = ((a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def measure(experts: int, choices: np.ndarray, dim: int, width: int, rounds: int) -> None:
    """Prints each candidate's rate; of one that fails, the reason."""
    # A multiply-add counts as two; each product is computed once forward and twice backward.
    of_matmul = 2 * choices.size * dim * 2 * width
    of_layer = 3 * 2 * choices.size * dim * 3 * width
    candidates: dict[str, Callable[[], Callable[[], Any]]] = {
        name: lambda name=name: ours(name, choices, experts, dim, width) for name in ("blocks", "ragged", "mosaic_gpu")
    }
    candidates["torch"] = lambda: of_torch(choices, experts, dim, width)
    of_blocks = None
    for name, make in candidates.items():
        plain = of_matmul / seconds(plain_matmul(choices.size, dim, 2 * width), rounds)
        try:
            step = make()
            rate = of_layer / seconds(step, rounds)
            figure = f"{rate / 1e12:8.3f} TFLOP/s, {rate / plain:.0%} of a plain matmul's {plain / 1e12:.3f}"
            if name != "torch":
                of_blocks = step() if name == "blocks" else of_blocks
                figure += f", {difference(step(), of_blocks):.4f} from blocks"
        except (RuntimeError, NotImplementedError, ImportError, InputError) as error:  # such as too little memory
            figure = f"failed: {reason_of(error)}"
        print(f"{experts} experts, {len(choices):,} tokens: {name:10} {figure}", flush=True)


def main() -> None:
    """Measures each number of experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[128, 16])
    parser.add_argument("--choices", type=int, default=131_072, help="tokens times the experts that each has chosen")
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--dim", type=int, default=2816)
    parser.add_argument("--width", type=int, default=704)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    print(f"{jax.devices()[0].device_kind} ({jax.devices()[0].platform})", flush=True)
    for experts in given.experts:
        order = np.random.default_rng(0).random((given.choices // given.chosen, experts)).argsort(axis=1)
        measure(experts, order[:, : given.chosen].astype(np.int32), given.dim, given.width, given.rounds)


if __name__ == "__main__":
    main()
