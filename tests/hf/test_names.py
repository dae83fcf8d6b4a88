"""The table is a bijection between the parameters of the model and the tensors of the reference."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from gemma4_jax.checkpoints.parameters import flatten_paths
from gemma4_jax.hf.names import abbreviate, tensors
from gemma4_jax.model import Gemma4
from gemma4_jax.sizes import SIZES
from tests.hf import samples

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tensors.json").read_text())

BUFFERS = ("layer_scalar", "std_bias", "std_scale", "input_min", "input_max", "output_min", "output_max")

# Spec section 1; without buffers.
PARAMETERS = {"e2b": 5_104_297_504, "e4b": 7_941_100_832, "26b_a4b": 25_805_933_872, "31b": 31_273_086_512}

sizes = pytest.mark.parametrize("size", SIZES)


def expand(line: str) -> list[str]:
    """The names that `abbreviate` wrote as one."""
    ranges = re.search(r"\{([\d,-]+)\}", line)
    if ranges is None:
        return [line]
    bounds = [tuple(map(int, part.split("-"))) for part in ranges[1].split(",")]
    layers = [layer for bound in bounds for layer in range(bound[0], bound[-1] + 1)]
    return [line.replace(ranges[0], str(layer)) for layer in layers]


@sizes
def test_every_tensor_of_the_reference_and_no_other(size):
    expected = {name: tuple(shape) for line, shape in GOLDEN[size].items() for name in expand(line)}
    table = tensors(SIZES[size]())
    assert len({tensor.name for tensor in table}) == len(table)
    assert {tensor.name: tensor.shape for tensor in table if not tensor.is_redundant} == expected


@sizes
def test_every_parameter_of_the_model_is_filled_once(size):
    config = SIZES[size]()
    state = nnx.state(nnx.eval_shape(lambda: Gemma4(config, nnx.Rngs(0))))
    shapes = {path: leaf.shape for path, leaf in flatten_paths(nnx.to_pure_dict(state)).items()}
    filled: dict[str, list] = {}
    for tensor in tensors(config):
        if tensor.path is not None:
            filled.setdefault(tensor.path, []).append(tensor)
    assert filled.keys() == shapes.keys()
    for path, stack in filled.items():
        if stack[0].index is None:
            assert [tensor.our_shape for tensor in stack] == [shapes[path]], path
        else:
            assert [tensor.index for tensor in stack] == list(range(shapes[path][0])), path
            assert {tensor.our_shape for tensor in stack} == {shapes[path][1:]}, path


@sizes
def test_only_unused_kv_is_carried(size):
    for tensor in tensors(SIZES[size]()):
        if tensor.path is None:
            assert tensor.is_redundant, tensor.name


@pytest.mark.parametrize("size", PARAMETERS)
def test_number_of_parameters(size):
    table = [tensor for tensor in tensors(SIZES[size]()) if not tensor.is_redundant]
    counted = [math.prod(tensor.shape) for tensor in table if not tensor.name.endswith(BUFFERS)]
    assert sum(counted) == PARAMETERS[size]


@pytest.mark.parametrize("size", samples.OFFICIAL_SIZES)
def test_there_and_back(size):
    rng = np.random.default_rng(0)
    for tensor in tensors(samples.shrink(size, with_audio=True)):
        array = rng.standard_normal(tensor.shape)
        ours = tensor.to_ours(array)
        assert ours.shape == tensor.our_shape
        np.testing.assert_array_equal(tensor.to_theirs(ours), array)


def test_axes_go_where_the_layout_says():
    config = samples.shrink("26b_a4b")
    table = {tensor.name.removeprefix("model.language_model.layers.0."): tensor for tensor in tensors(config)}
    text = config.text
    q = np.arange(text.num_heads * text.head_dim * text.embed_dim).reshape(-1, text.embed_dim)
    head, channel, column = 2, 5, 7
    assert (
        table["self_attn.q_proj.weight"].to_ours(q)[column, head, channel] == q[head * text.head_dim + channel, column]
    )
    assert (
        table["self_attn.o_proj.weight"].to_ours(q.T)[head, channel, column]
        == q[head * text.head_dim + channel, column]
    )
    gate_up = np.arange(text.num_experts * 2 * text.expert_dim * text.embed_dim)
    gate_up = gate_up.reshape(text.num_experts, 2 * text.expert_dim, text.embed_dim)
    ours = table["experts.gate_up_proj"].to_ours(gate_up)
    np.testing.assert_array_equal(ours[:, :, 0].mT, gate_up[:, : text.expert_dim])
    np.testing.assert_array_equal(ours[:, :, 1].mT, gate_up[:, text.expert_dim :])


def test_layers_are_numbered_by_stack_and_period():
    config = samples.shrink("e2b")  # periods of 5: two own, two shared
    table = {tensor.name: tensor for tensor in tensors(config)}
    places = {}
    for layer in (0, 7, 10, 19):
        tensor = table[f"model.language_model.layers.{layer}.layer_scalar"]
        places[layer] = (tensor.path, tensor.index)
    assert places == {
        0: ("decoder.own.layers.0.layer_scalar", 0),
        7: ("decoder.own.layers.2.layer_scalar", 1),
        10: ("decoder.shared.layers.0.layer_scalar", 0),
        19: ("decoder.shared.layers.4.layer_scalar", 1),
    }


def test_redundant_tensors_are_those_that_released_files_hold():
    redundant = [tensor.name for tensor in tensors(SIZES["e2b"]()) if tensor.is_redundant]
    prefix = "model.language_model.layers.{15-34}.self_attn."
    expected = [f"{prefix}{name}.weight" for name in ("k_norm", "k_proj", "v_proj")]
    assert sorted(abbreviate(redundant)) == expected


def test_abbreviate():
    names = ["norm", *(f"a.layers.{layer}.b" for layer in (3, 0, 1, 2, 7)), "c.layers.4.d"]
    assert abbreviate(names) == ["norm", "a.layers.{0-3,7}.b", "c.layers.{4}.d"]
    assert [name for line in abbreviate(names) for name in expand(line)] == [
        "norm",
        *sorted(names[1:6]),
        "c.layers.4.d",
    ]
    hostile = f"a.layers.{'9' * 5000}.b"
    assert abbreviate([hostile]) == [hostile]


@sizes
def test_live_names_and_shapes(size):
    pytest.importorskip("torch")
    make = pytest.importorskip("tests.golden.make")
    expected = make.reference_tensors(SIZES[size]())
    assert {tensor.name: tensor.shape for tensor in tensors(SIZES[size]()) if not tensor.is_redundant} == expected
