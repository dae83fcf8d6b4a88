"""One config on several meshes: the same run within float error, and one run may move from mesh to mesh."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.launch import command_line
from gemma4_jax.sharding import batch_sharding, make_mesh
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.loop import train
from gemma4_jax.train.program import make_program
from gemma4_jax.train.state import create_state
from tests.train.tiny import typed

MESHES = {
    "one": {},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "data_expert": {"data": 2, "expert": 4},
}
NUM_STEPS = 4

# float32 sums in another order, through 4 steps of AdamW: the largest measured difference is 2.0e-7 of the loss.
TOLERANCE = 2e-6


def short_config():
    config = command_line.load(Path(__file__).parents[1] / "train" / "tiny.py")
    config.train.num_steps = NUM_STEPS
    return config


def loss_curve(config, sizes: dict[str, int]) -> list[float]:
    """Losses of the first steps on as many of the devices as the mesh has."""
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    iterator = make_train_iterator(typed(config).resolved(), Tokenizer.load("bundled"))
    losses = []
    with jax.set_mesh(mesh):
        program = make_program(typed(config), mesh)
        state = create_state(program.state, program.config)
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        if mesh.size > 1:
            shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state.trained)]
            assert min(shares) <= 1 / 4  # parameters are really spread
        for _ in range(NUM_STEPS):
            state, metrics = program.train_step(state, jax.device_put(next(iterator), batch_sharding(mesh)))
            losses.append(float(metrics.means["loss"]))
    iterator.close()
    return losses


@pytest.fixture(scope="module")
def expected() -> list[float]:
    losses = loss_curve(short_config(), MESHES["one"])
    assert losses[-1] != losses[0]
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp_tensor", "data_expert"])
def test_same_loss_curve_on_every_mesh(mesh, expected):
    losses = loss_curve(short_config(), MESHES[mesh])
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)


@pytest.mark.slow
def test_a_run_moves_from_one_mesh_to_another(expected, tmp_path):
    """From a checkpoint of fsdp x tensor on data x expert, and the losses are those of one device all the time."""
    config, run_dir = short_config(), tmp_path / "run"
    config.run_dir = str(run_dir)
    config.checkpoint.every_steps, config.evaluators.eval.num_documents = 2, 2
    config.mesh.update(data=1, **MESHES["fsdp_tensor"])
    train(typed(config))
    # As if it had been stopped before its last checkpoint.
    shutil.rmtree(run_dir / "checkpoints" / str(NUM_STEPS))
    (run_dir / "summary.json").unlink()
    config.mesh.update(fsdp=1, tensor=1, **MESHES["data_expert"])
    assert train(typed(config))["steps"] == NUM_STEPS
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
