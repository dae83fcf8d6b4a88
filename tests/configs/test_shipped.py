"""Every shipped config is a run that could start."""

import ast
import math
import re
from pathlib import Path

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from gemma4_jax.configs import base
from gemma4_jax.launch import command_line
from gemma4_jax.model import Gemma4
from gemma4_jax.run_config import check_mesh
from gemma4_jax.sharding import MESH_AXES, param_shardings
from tests.train.tiny import typed

DEVICES = {
    "pretrain_e2b": 64,
    "pretrain_31b": 256,
    "finetune_26b_a4b": 64,
    "finetune_e4b_long": 64,
    "finetune_31b_long": 256,
}
"""What the docstring of the config asks for; 1 where it is not listed."""


@pytest.mark.parametrize("name", command_line.shipped())
def test_config_is_valid_and_says_what_it_is(name):
    path = command_line.shipped()[name]
    command_line.from_command_line([f"--config={path}"])
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert name == "base" or f"gemma4 train --config={name}" in docstring


@pytest.mark.parametrize("name", command_line.shipped())
def test_parameters_and_batch_fit_the_stated_devices(name):
    config = command_line.load(command_line.shipped()[name])
    sizes = config.mesh.to_dict()
    known = sizes["fsdp"] * sizes["expert"] * sizes["context"] * sizes["tensor"]
    sizes["data"] = DEVICES.get(name, 1) // known
    assert sizes["data"] * known == DEVICES.get(name, 1)
    check_mesh(typed(config).resolved(sizes["context"]), sizes)

    mesh = AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES))
    architecture = typed(config).model
    model = nnx.eval_shape(lambda: Gemma4(architecture, nnx.Rngs(0)))
    shardings = param_shardings(nnx.state(model), mesh)
    assert len(jax.tree.leaves(shardings)) == len(jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("name", sorted(command_line.shipped().keys() - {"base", "quickstart"}))
def test_the_compiled_step_is_that_of_the_config_and_fits_a_chip(name):
    """benchmarks/compile_configs.py is run again when one of these changes."""
    config = command_line.load(command_line.shipped()[name])
    page = (Path(__file__).parents[2] / "docs" / "compiled.md").read_text()
    cells = re.findall(r"[^|\n]+", next(line for line in page.splitlines() if line.startswith(f"| {name} ")))
    _, slice_name, mesh, rows, pieces, *_, together = (cell.strip() for cell in cells)
    assert math.prod(map(int, slice_name.removeprefix("v5p:").split("x"))) == DEVICES.get(name, 1)
    sizes = {axis: int(size) for axis, size in re.findall(r"(\w+) (\d+)", mesh)}
    assert {axis: sizes.get(axis, 1) for axis in MESH_AXES if axis != "data"} == {
        axis: config.mesh[axis] for axis in MESH_AXES if axis != "data"
    }
    assert rows == f"{config.data.batch_size} x {config.data.seq_len:,}"
    assert int(pieces) == config.train.grad_accum_steps
    assert float(together) < 95


def test_base_is_locked():
    config = base.get_config()
    with pytest.raises(AttributeError):
        config.train.num_step = 3
