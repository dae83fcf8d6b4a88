import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gemma4_jax import sharding
from gemma4_jax.errors import InputError
from gemma4_jax.layers import Linear
from gemma4_jax.model import Gemma4
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import BATCH_AXES, LOGICAL_TO_MESH, MESH_AXES, make_mesh, param_shardings, partition_spec
from gemma4_jax.sizes import SIZES
from gemma4_jax.vision.tower import VisionTower


def test_the_table_names_mesh_axes_only():
    named = {
        name for entry in LOGICAL_TO_MESH.values() for name in ((entry,) if isinstance(entry, str) else entry or ())
    }
    assert named == set(MESH_AXES)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("batch", "length", None), P(BATCH_AXES, "context", None)),
        (("vocab", "embed"), P("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), P(None, "fsdp", "tensor", None)),
        (("expert", "embed", "gate_and_up", "mlp"), P("expert", "fsdp", None, "tensor")),
        ((), P()),
    ],
)
def test_logical_axes_become_mesh_axes(axes, expected):
    assert partition_spec(axes) == expected


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("vocab", "embed", "kv_heads"), ("batch", "embed")])
def test_two_axes_of_an_array_on_one_mesh_axis_are_an_error(axes):
    with pytest.raises(ValueError, match="one mesh axis on two axes"):
        partition_spec(axes)


def test_a_name_that_is_not_in_the_table_is_an_error():
    with pytest.raises(KeyError, match="widht"):
        partition_spec(("widht",))


def test_no_large_array_of_e2b_is_whole_on_a_device():
    model = nnx.eval_shape(lambda: Gemma4(SIZES["e2b"](), nnx.Rngs(0)))
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 1, 1), MESH_AXES, (jax.sharding.AxisType.Auto,) * len(MESH_AXES))
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    shares = {
        path: (
            math.prod(sharding.get_value().shard_shape(variables[path].get_value().shape)),
            variables[path].get_value().size,
        )
        for path, sharding in nnx.to_flat_state(param_shardings(nnx.state(model), mesh))
    }
    here, everywhere = (sum(sizes) for sizes in zip(*shares.values(), strict=True))
    assert here < 1.02 * everywhere / 8


@pytest.mark.parametrize("size", SIZES)
def test_every_array_of_every_size_has_axes_of_the_table(size):
    model = nnx.eval_shape(lambda: Gemma4(SIZES[size](), nnx.Rngs(0)))
    mesh = jax.sharding.AbstractMesh((1,) * len(MESH_AXES), MESH_AXES)
    shardings = param_shardings(nnx.state(model), mesh)
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    for path, variable in nnx.to_flat_state(shardings):
        # As many entries as axes: none is left to chance.
        assert len(variable.get_value().spec) == variables[path].get_value().ndim, path
        assert set(variables[path].get_metadata()["axes"]) <= LOGICAL_TO_MESH.keys(), path


@pytest.mark.parametrize("size", SIZES)
def test_an_axis_that_is_called_a_width_has_that_width(size):
    config = SIZES[size]()
    text, vision, audio = config.text, config.vision, config.audio
    widths = {
        "vocab": text.vocab_size,
        "embed": text.embed_dim,
        "per_layer_embed": text.per_layer_embed_dim,
        "expert": text.num_experts,
        "expert_score": text.num_experts,
        "vision_embed": vision and vision.embed_dim,
        "audio_embed": audio and audio.embed_dim,
        "audio_output": audio and audio.output_dim,
    }
    model = nnx.eval_shape(lambda: Gemma4(config, nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        axes = variable.get_metadata()["axes"]
        shape = variable.get_value().shape
        for axis, width in zip(axes, shape[len(shape) - len(axes) :], strict=True):
            assert width == widths.get(axis, width), (path, axis)


SPECS = {
    r"embedder\.table": P("tensor", "fsdp"),
    r"per_layer_embedder\.table": P("tensor", None, "fsdp"),
    r"per_layer_embedder\.projection\.kernel": P("fsdp", None, None),
    r".*layers.*\.attention\.(q|k|v|relative_k)\.kernel": P(None, "fsdp", "tensor", None),
    r".*layers.*\.attention\.o\.kernel": P(None, "tensor", None, "fsdp"),
    r".*layers.*mlp\.(gate|up)\.kernel": P(None, "fsdp", "tensor"),
    r".*layers.*mlp\.down\.kernel": P(None, "tensor", "fsdp"),
    r".*\.moe\.router\.kernel": P(None, "fsdp", None),
    r".*\.moe\.experts\.gate_up": P(None, "expert", "fsdp", None, "tensor"),
    r".*\.moe\.experts\.down": P(None, "expert", "tensor", "fsdp"),
    r".*\.per_layer_input\.gate\.kernel": P(None, "fsdp", None),
    r".*\.per_layer_input\.projection\.kernel": P(None, None, "fsdp"),
    r"vision\.patch_embed\.kernel": P(None, "fsdp"),
    r"vision\.position_table": P(None, None, "fsdp"),
    r"audio\.subsample\..\.kernel": P(None, None, None, None),
    r"audio\.input_projection\.kernel": P(None, None, "fsdp"),
    r"audio\.layers\.convolution\.start\.kernel": P(None, "fsdp", None, "tensor"),
    r"audio\.layers\.convolution\.kernel": P(None, None, None, "tensor"),
    r"audio\.layers\.convolution\.end\.kernel": P(None, "tensor", "fsdp"),
    r"audio\.output\.kernel": P("fsdp", None),
    r"(image|audio)_projection\.kernel": P(None, "fsdp"),
}
"""How a model's matrices are spread, by path; whatever is no matrix is on every device."""


@pytest.mark.parametrize("size", SIZES)
def test_matrices_are_spread_as_they_always_were_and_all_else_is_replicated(size):
    model = nnx.eval_shape(lambda: Gemma4(SIZES[size](), nnx.Rngs(0)))
    mesh = jax.sharding.AbstractMesh((1,) * len(MESH_AXES), MESH_AXES)
    for path, variable in nnx.to_flat_state(param_shardings(nnx.state(model), mesh)):
        name, spec = ".".join(map(str, path)), variable.get_value().spec
        matches = [expected for pattern, expected in SPECS.items() if re.fullmatch(pattern, name)]
        assert [spec] == (matches or [P(*[None] * len(spec))]), name


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 1, 1, 1, 1)),
        ({"data": -1}, (8, 1, 1, 1, 1)),
        ({"fsdp": 4, "tensor": 2}, (1, 4, 1, 1, 2)),
        ({"tensor": 2, "expert": -1, "data": 2}, (2, 1, 2, 1, 2)),
        ({"data": -1, "fsdp": 8}, (1, 8, 1, 1, 1)),
    ],
)
def test_a_mesh_has_all_axes_in_order(sizes, shape):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(shape))])
    assert mesh.axis_names == MESH_AXES
    assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"date": 8}, r"mesh\.date is not a mesh axis: accepted are data, fsdp, expert, context, tensor"),
        ({"data": 0}, r"mesh\.data=0 is not possible: it must be at least 1, or -1 for the rest"),
        ({"data": -2}, r"mesh\.data=-2 is not possible"),
        ({"data": -1, "fsdp": -1}, r"mesh has 2 axes of -1: at most one"),
        ({"data": 3}, r"mesh \(data=3, .*\) does not fit 8 devices: the product .* must be 8"),
        ({"data": -1, "fsdp": 3}, r"mesh \(data=-1, fsdp=3, .*\) does not fit 8 devices"),
        ({"data": 16}, r"does not fit 8 devices"),
    ],
)
def test_an_impossible_mesh_is_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU v5p as far as the layout of a mesh looks at it."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    core_on_chip: int = 0
    process_index: int = 0


def chips(*sides: int) -> list[Chip]:
    return [Chip(i, place) for i, place in enumerate(itertools.product(*map(range, sides)))]


@pytest.mark.parametrize(
    ("sizes", "slice_sides"),
    [
        ({"data": -1, "fsdp": 8}, (4, 4, 4)),
        ({"fsdp": 8, "expert": 8}, (4, 4, 4)),
        ({"data": 2, "fsdp": 32, "tensor": 4}, (4, 8, 8)),
        ({"data": 2, "fsdp": 2, "context": 2, "tensor": 8}, (4, 4, 4)),
        ({"data": 3, "tensor": 64}, (4, 4, 12)),
    ],
)
def test_a_mesh_splits_the_axes_of_a_slice_where_it_must(sizes, slice_sides):
    devices = chips(*slice_sides)
    mesh = make_mesh(sizes, devices)
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(len(devices)))
    assert all(mesh.shape[axis] == size for axis, size in sizes.items() if size > 0)


def test_devices_that_are_no_whole_slice_are_refused():
    with pytest.raises(InputError, match=r"mesh \(data=7, .*\) cannot be laid over these 7 devices of kind TPU v5p"):
        make_mesh({"data": -1}, chips(2, 2, 2)[1:])
    two_slices = [*chips(2, 2, 1), *chips(2, 2, 1)]
    with pytest.raises(InputError, match=r"all the devices of one slice"):
        make_mesh({"data": 2, "fsdp": 4}, two_slices)


def state_of(**outputs: int) -> nnx.State:
    return nnx.state(Linear(nnx.Rngs(0), {"embed": 8}, outputs, param_dtype=jnp.float32))


def spec_of(state: nnx.State, mesh: jax.sharding.Mesh) -> P:
    return param_shardings(state, mesh)["kernel"].get_value().spec


def test_parameters_are_spread_by_their_axes():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert spec_of(state_of(heads=4, head_dim=3), mesh) == P("fsdp", "tensor", None)


def test_the_leading_axis_of_a_stack_is_layers():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), state_of(mlp=4))
    assert spec_of(stacked, make_mesh({"fsdp": 4, "tensor": 2})) == P(None, "fsdp", "tensor")


def test_key_value_heads_fewer_than_the_tensor_axis_are_replicated():
    mesh = make_mesh({"data": 2, "tensor": 4})
    assert spec_of(state_of(kv_heads=2, head_dim=4), mesh) == P("fsdp", None, None)
    assert spec_of(state_of(kv_heads=8, head_dim=4), mesh) == P("fsdp", "tensor", None)


def test_an_axis_that_its_mesh_axis_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"mesh\.tensor=8 does not divide axis 'heads' of kernel, which is 4: choose"):
        spec_of(state_of(heads=4, head_dim=4), make_mesh({"tensor": 8}))


def test_constrain_lays_out_inside_a_mesh_and_does_nothing_outside():
    x = jnp.arange(32.0).reshape(8, 4)
    assert sharding.constrain(x, "batch", None) is x
    mesh = make_mesh({"data": 2, "fsdp": 2, "expert": 2})
    with jax.set_mesh(mesh):
        laid_out = jax.jit(lambda x: sharding.constrain(x, "batch", None))(x)
    assert laid_out.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
    assert {shard.data.shape for shard in laid_out.addressable_shards} == {(1, 4)}


def test_the_patches_of_an_image_stay_on_the_device_of_their_row():
    config, num_patches = SIZES["tiny"]().vision, 60
    make = functools.partial(VisionTower, dtype=jnp.float32, param_dtype=jnp.float32, remat_policy="none")
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0), config)))
    mesh = make_mesh({"data": 2, "fsdp": 4})
    shapes = ((8, num_patches, config.patch_dim), jnp.uint8), ((8, num_patches, 2), jnp.int32), ((8, num_patches), int)
    batch = (jax.ShapeDtypeStruct(*shape, sharding=sharding.batch_sharding(mesh)) for shape in shapes)
    state = jax.tree.map(
        lambda leaf, spread: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread),
        state,
        param_shardings(state, mesh),
    )
    with jax.set_mesh(mesh):
        encode = jax.jit(lambda state, *batch: nnx.merge(graphdef, state)(*batch, KernelPolicy()))
        program = encode.lower(state, *batch).compile().as_text()
    sent = re.findall(r" = (.+) (?:all-\w+|collective-permute|reduce-scatter)\(", program)
    assert sent  # weights
    assert not [shape for shape in sent if str(num_patches) in re.findall(r"\d+", shape)]
