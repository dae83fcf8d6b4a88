"""Every shipped config is a run that could start."""

import ast
import inspect
import math
import re
from pathlib import Path

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from gemma4_jax.configs import base
from gemma4_jax.launch import checks, run_config
from gemma4_jax.model import Gemma4
from gemma4_jax.sharding import MESH_AXES, param_shardings

DEVICES = {"pretrain_e2b": 64, "pretrain_31b": 256, "finetune_26b_a4b": 64}
"""What the docstring of the config asks for; 1 where it is not listed."""


@pytest.mark.parametrize("name", run_config.shipped())
def test_config_is_valid_and_says_what_it_is(name):
    path = run_config.shipped()[name]
    run_config.check(run_config.load(path))
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert name == "base" or f"gemma4 train --config={name}" in docstring


@pytest.mark.parametrize("name", run_config.shipped())
def test_parameters_and_batch_fit_the_stated_devices(name):
    config = run_config.load(run_config.shipped()[name])
    sizes = config.mesh.to_dict()
    known = sizes["fsdp"] * sizes["expert"] * sizes["context"] * sizes["tensor"]
    sizes["data"] = DEVICES.get(name, 1) // known
    assert sizes["data"] * known == DEVICES.get(name, 1)
    checks.check_batch(config, sizes)

    mesh = AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES))
    architecture = run_config.model_config(config)
    model = nnx.eval_shape(lambda: Gemma4(architecture, nnx.Rngs(0)))
    shardings = param_shardings(nnx.state(model), mesh)
    assert len(jax.tree.leaves(shardings)) == len(jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("name", sorted(run_config.shipped().keys() - {"base", "quickstart"}))
def test_the_compiled_step_is_that_of_the_config_and_fits_a_chip(name):
    """benchmarks/compile_configs.py is run again when one of these changes."""
    config = run_config.load(run_config.shipped()[name])
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


def test_every_field_of_base_has_a_comment():
    lines = [line.strip() for line in inspect.getsource(base.get_config).splitlines()]
    fields = [
        number for number, line in enumerate(lines) if re.match(r"\w+\.\w+ = ", line) and "ConfigDict()" not in line
    ]
    assert len(fields) > 30
    assert [lines[number] for number in fields if not lines[number - 1].startswith("#")] == []


def test_base_is_locked():
    config = base.get_config()
    with pytest.raises(AttributeError):
        config.train.num_step = 3
