"""One tiny step on every mesh axis alone, with and without what a model or a batch may lack, cut into pieces or not."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.batch import Batch
from gemma4_jax.config import AudioConfig, Gemma4Config
from gemma4_jax.launch import command_line
from gemma4_jax.sharding import batch_sharding, make_mesh, param_shardings
from gemma4_jax.sizes import SIZES
from gemma4_jax.train.program import make_program
from gemma4_jax.train.state import create_state
from gemma4_jax.train.step import StepMetrics
from tests.hf import samples
from tests.train.tiny import typed

LENGTH = 32
"""Tokens of a row."""

TINY = SIZES["tiny"]()
TEXT = dataclasses.replace(
    TINY, text=dataclasses.replace(TINY.text, num_layers=1, attention_period=1, num_kv_shared_layers=0, vocab_size=64)
)
# No source gives documents with sounds: the tower is there, and hears nothing.
SILENT_AUDIO = AudioConfig(embed_dim=8, num_layers=1, num_heads=2, subsampling_channels=(8, 4), output_dim=8)


def rows_of(config: Gemma4Config, *, with_images: bool) -> Batch:
    """Four rows of which each pair is the same: every piece of two then holds what the whole batch holds."""
    rng = np.random.default_rng(0)

    def words(length: int) -> list[int]:
        return rng.integers(15, 64, length).tolist()

    def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
        return [samples.image(rng, config, *size) for size in sizes] if with_images else []

    full = [[words(3), *pictures((2, 3)), words(9)], [*pictures((1, 2)), words(6)]]
    short = [[words(7), *pictures((1, 1)), words(5)]]
    return samples.batch([full, full, short, short], config, length=LENGTH)


def take_step(config: Gemma4Config, batch: Batch, sizes: dict[str, int], num_pieces: int) -> StepMetrics:
    """The metrics of the first step from the weights of tests/hf/samples.py, which depend on a tensor's name alone."""
    run = command_line.load(Path(__file__).parent / "tiny.py")
    run.data.batch_size, run.train.loss_chunk, run.train.grad_accum_steps = len(batch.tokens), LENGTH // 2, num_pieces
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    program = make_program(dataclasses.replace(typed(run), model=config), mesh)
    values = nnx.state(samples.model(config, samples.lively_weights(config)))
    with jax.set_mesh(mesh):
        values = jax.device_put(values, param_shardings(values, mesh))
        state = create_state(program.state, program.config, values)
        return jax.device_get(program.train_step(state, jax.device_put(batch, batch_sharding(mesh)))[1])


@pytest.fixture(scope="module")
def expected() -> dict[bool, StepMetrics]:
    """What a step on one device and in one piece measures, without images and with them."""
    without_tower = dataclasses.replace(TEXT, vision=None)
    return {
        False: take_step(without_tower, rows_of(TEXT, with_images=False), {}, 1),
        True: take_step(TEXT, rows_of(TEXT, with_images=True), {}, 1),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "towers", "with_images", "num_pieces"),
    [
        ("data", {}, False, 2),
        ("fsdp", {"audio": SILENT_AUDIO}, False, 2),
        ("expert", {"vision": None}, False, 2),
        ("context", {}, True, 2),
        ("tensor", {"audio": SILENT_AUDIO}, True, 1),
    ],
)
def test_a_step_is_the_same_on_every_mesh_axis_whatever_is_absent(axis, towers, with_images, num_pieces, expected):
    batch = rows_of(TEXT, with_images=with_images)
    assert (batch.patches.shape[1] > 0) == with_images
    metrics = take_step(dataclasses.replace(TEXT, **towers), batch, {axis: 2}, num_pieces)
    assert_same(metrics, expected[with_images])


def assert_same(metrics: StepMetrics, wanted: StepMetrics) -> None:
    # Sums in float32 in another order: the largest measured difference is 1.5e-7 of a value.
    given, expected = ({**step.means, "grad_norm": step.grad_norm} for step in (metrics, wanted))
    for name, value in expected.items():
        np.testing.assert_allclose(given[name], value, rtol=2e-6, err_msg=name)
    assert (int(metrics.tokens), int(metrics.images)) == (int(wanted.tokens), int(wanted.images))
    assert bool(metrics.is_sane)


def sliding(**changes: Any) -> Gemma4Config:
    """A sliding layer and a global one, twice, of which the second pair has no keys and values of its own."""
    text = {"num_layers": 4, "attention_period": 2, "num_kv_shared_layers": 2, "sliding_window": 8, "vocab_size": 64}
    return dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, **text, **changes))


@pytest.fixture(scope="module")
def expected_sliding() -> dict[bool, StepMetrics]:
    """By whether soft tokens of an image see each other."""
    batch = rows_of(TEXT, with_images=True)
    return {both: take_step(sliding(image_blocks_bidirectional=both), batch, {}, 1) for both in (False, True)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "sees_ahead"),
    [
        ({"context": 2}, True),
        ({"context": 4, "fsdp": 2}, False),
        ({"context": 2, "tensor": 2, "expert": 2}, False),
        ({"context": 8}, False),
    ],
    ids=str,
)
def test_positions_may_be_spread(sizes, sees_ahead, expected_sliding):
    """Documents and windows go across the shards of a row: a shard of context=8 is half a window."""
    config = sliding(image_blocks_bidirectional=sees_ahead)
    metrics = take_step(config, rows_of(TEXT, with_images=True), sizes, 1)
    assert_same(metrics, expected_sliding[sees_ahead])
