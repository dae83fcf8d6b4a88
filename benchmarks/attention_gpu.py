"""Attention and a training step of E2B on a GPU, beside torch.

  pip install ".[mosaic_gpu]" torch
  python benchmarks/attention_gpu.py [--peak=989]     # TFLOP/s in bfloat16 of the GPU: an H100 has 989

Written without a GPU at hand: none has run it. Prints TFLOP/s, forward and backward in bfloat16, of both kinds of
layers, one document a row, with only the scores counted that somebody sees; beside torch's
`scaled_dot_product_attention`, causal and without a window, of which the same are counted; and the share of the peak
that a training step of E2B reaches.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.batch import FIELDS, Batch
from gemma4_jax.configs import base
from gemma4_jax.counts import flops_per_token
from gemma4_jax.errors import reason_of
from gemma4_jax.ops.attention import IMPLEMENTATIONS, Shape, attend
from gemma4_jax.ops.attention.spans import document_spans
from gemma4_jax.run_config import RunConfig
from gemma4_jax.sharding import batch_sharding, make_mesh
from gemma4_jax.sizes import SIZES
from gemma4_jax.train.program import make_program
from gemma4_jax.train.state import create_state


def seconds(step: Callable[[], Any], rounds: int) -> float:
    """Median of some runs of a function that returns when it is done; the first one compiles."""
    step()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ours(name: str, length: int, heads: int, kv_heads: int, head_dim: int, window: int | None) -> Callable[[], Any]:
    """Forward and backward of an implementation."""
    index = jnp.arange(length)[None]
    spans = document_spans(index, index, window=window)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, direction = (
        jax.random.normal(key, (1, length, n, head_dim), jnp.bfloat16)
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.vdot(attend(q * head_dim**-0.5, k, v, spans, implementation=name), direction)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return lambda: jax.block_until_ready(gradient(q, k, v))


def of_torch(length: int, heads: int, kv_heads: int, head_dim: int) -> Callable[[], Any]:
    """Forward and backward of torch's attention, causal, on its GPU if it has one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (
        torch.randn(1, n, length, head_dim, dtype=torch.bfloat16, device=device, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    direction = torch.randn_like(q)

    def step() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), direction)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def attention(size: str, lengths: list[int], rounds: int) -> None:
    """Prints TFLOP/s of each kind of layer of a size; nothing where one fails, with the reason."""
    text, platform = SIZES[size]().text, jax.devices()[0].platform
    kinds = {
        "sliding": (text.num_heads, text.num_kv_heads, text.head_dim, text.sliding_window),
        "global": (text.num_heads, text.num_global_kv_heads, text.global_head_dim, None),
    }
    for kind, (heads, kv_heads, head_dim, window) in kinds.items():
        for length in lengths:
            seen = sum(min(t + 1, window or length) for t in range(length))
            # Two matrix products forward and five backward, a multiply-add counted as two.
            operations = 7 * 2 * heads * head_dim * seen
            shape = Shape(length, length, head_dim, None if window is None else window - 1, 0)
            able = [name for name, known in IMPLEMENTATIONS.items() if known.reason_against(shape, platform) is None]
            candidates: dict[str, Callable[[], Callable[[], Any]]] = {
                name: lambda name=name: ours(name, length, heads, kv_heads, head_dim, window)  # noqa: B023, used at once
                for name in able
                if name != "reference"
            }
            candidates["torch"] = lambda: of_torch(length, heads, kv_heads, head_dim)  # noqa: B023, used at once
            for name, make in candidates.items():
                try:
                    figure = f"{operations / seconds(make(), rounds) / 1e12:8.1f} TFLOP/s"
                except (
                    RuntimeError,
                    NotImplementedError,
                    ImportError,
                    ValueError,
                ) as error:  # such as too little memory
                    figure = f"failed: {reason_of(error)}"
                print(f"{size} {kind:8} T {length:7,} {name:10} {figure}", flush=True)


def step(size: str, length: int, peak: float, rounds: int) -> None:
    """Prints tokens/s of a training step of text on all devices, and the share of their peak that it reaches."""
    config = base.get_config(size)
    devices = len(jax.devices())
    config.mesh.fsdp, config.mesh.data = devices, 1
    config.data.seq_len, config.data.batch_size, config.data.images_per_row = length, devices, 0
    config.train.compute_dtype, config.train.remat, config.train.loss_chunk = "bfloat16", "attention", 512
    if config.model.text.per_layer_embed_dim:
        # It is looked up and takes no part in a product; its moments would take 28 GB.
        config.optimizer.groups = ({"pattern": r"per_layer_embedder\.table", "learning_rate_scale": 0.0},)
        config.train.frozen_dtype = "bfloat16"
    run = RunConfig.from_dict(config.to_dict())
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vision=None, audio=None))
    mesh = make_mesh({"fsdp": devices})
    program = make_program(run, mesh)
    sizes = {**program.row.sizes(), "batch": devices, "xy": 2}
    arrays = {
        name: np.full([sizes[dim] for dim in field.dims], field.padding, field.dtype) for name, field in FIELDS.items()
    }
    arrays["tokens"] = np.random.default_rng(0).integers(16, 256, (devices, length)).astype(np.int32)
    arrays["targets"][:, :-1] = arrays["tokens"][:, 1:]
    arrays["loss_weights"][:, :-1] = arrays["segment_ids"][:] = 1
    arrays["positions"][:] = np.arange(length)
    with jax.set_mesh(mesh):
        batch = jax.device_put(Batch(**arrays), batch_sharding(mesh))
        state = create_state(program.state, program.config)

        def run_step() -> None:
            nonlocal state
            state, metrics = program.train_step(state, batch)
            jax.block_until_ready(metrics)

        rate = devices * length / seconds(run_step, rounds)
    # The backward pass is twice the forward pass; what is recomputed is not counted.
    used = 3 * flops_per_token(run.model, length) * rate / devices / 1e12
    print(f"{size} T {length:,}: {rate:,.0f} tokens/s, {used:.1f} TFLOP/s a device, {used / peak:.0%} of its peak")


def main() -> None:
    """Measures attention, then a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="e2b", choices=SIZES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32_768, 131_072])
    parser.add_argument("--step-length", type=int, default=8192)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a device in bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    device = jax.devices()[0]
    print(f"{len(jax.devices())} x {device.device_kind} ({device.platform})", flush=True)
    attention(given.size, given.lengths, given.rounds)
    step(given.size, given.step_length, given.peak, given.rounds)


if __name__ == "__main__":
    main()
