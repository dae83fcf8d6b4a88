"""The mesh, and the one table from logical axis names to mesh axes."""

import math
from collections.abc import Mapping, Sequence

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, outermost first: the later an axis, the closer its devices and the more they talk."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the rows of a batch are spread."""

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH_AXES,
    "length": "context",
    "patches": None,
    "frames": None,
    # parameters
    "embed": "fsdp",
    "per_layer_embed": "fsdp",
    "vision_embed": "fsdp",
    "audio_embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "conv": "tensor",
    "expert": "expert",
    "expert_score": None,
    "layers": None,
    "head_dim": None,
    "gate_and_up": None,
    "patch": None,
    "xy": None,
    "position": None,
    "audio_output": None,
    "tap": None,
    "mel": None,
    "channel": None,
    "in_channel": None,
    "scalar": None,
}
"""THE table. A logical axis that is missing here is a bug, and two of one array on one mesh axis are an error."""

YIELDING = ("per_layer_embed", "vision_embed")
"""Logical axes that leave their mesh axis to another of the same array, such as a projection to "embed", that has it
too."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh of a run, its axes laid along those of the network that joins the devices.

    An axis of the network is split where the mesh asks for it: an axis of 8 on a torus of 4 x 4 x 4 takes one and a
    half. `jax.make_mesh` refuses that on most TPUs.

    Args:
      sizes: mesh axis -> number of devices along it; axes left out are 1, and one may be -1 for the rest.
      devices: devices to use; all by default.
    Raises:
      InputError: an unknown axis, more than one -1, sizes that do not multiply to the number of devices, or devices
        that are not one whole block of a network.
    """
    devices = jax.devices() if devices is None else devices
    for axis, size in sizes.items():
        if axis not in MESH_AXES:
            raise InputError(f"mesh.{axis} is not a mesh axis: accepted are {', '.join(MESH_AXES)}.")
        if size < 1 and size != -1:
            raise InputError(f"mesh.{axis}={size} is not possible: it must be at least 1, or -1 for the rest.")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1:
        raise InputError(f"mesh has {shape.count(-1)} axes of -1: at most one axis may take the rest of the devices.")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    given = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if -1 in shape or math.prod(shape) != len(devices):
        raise InputError(
            f"mesh ({given}) does not fit {len(devices)} devices: the product of the mesh axes must be {len(devices)}."
        )
    try:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"mesh ({given}) cannot be laid over these {len(devices)} devices of kind {devices[0].device_kind}: "
            f"they must be all the devices of one slice, without holes."
        ) from error
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def partition_spec(axes: Sequence[str | None]) -> P:
    """Logical axis names of one array -> its PartitionSpec; an axis without a name is whole on every device.

    Raises:
      ValueError: if two axes of the array would be spread over the same mesh axis.
    """
    asked = [None if axis is None else LOGICAL_TO_MESH[axis] for axis in axes]
    spec = [
        None if axis in YIELDING and asked.count(entry) > 1 else entry for axis, entry in zip(axes, asked, strict=True)
    ]
    used = [name for entry in spec if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} put one mesh axis on two axes of the same array: {spec}")
    return P(*spec)


def param_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """Shardings of a model's variables, from the logical axes they carry.

    A stacked variable has one leading axis more than it names: "layers". Variables with less than two axes of their own
    (scales of norms, biases, clip bounds) are replicated: they are small, and what they multiply is whole. So are
    key-value heads fewer than the tensor axis, as grouped-query attention does everywhere; any other axis that its mesh
    axis does not divide is an error.

    Args:
      state: concrete or abstract nnx.State.
      mesh: the device mesh.
    Returns:
      An nnx.State of the same structure with a NamedSharding for every variable.
    Raises:
      InputError: an axis of a parameter is not divisible by its mesh axis.
    """

    def sharding(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        shape = variable.get_value().shape
        own = list(variable.get_metadata()["axes"])
        if len(own) < 2:
            return variable.replace(NamedSharding(mesh, P(*[None] * len(shape))))
        axes = ["layers"] * (len(shape) - len(own)) + own
        for i, (axis, mesh_axis, size) in enumerate(zip(axes, partition_spec(axes), shape, strict=True)):
            if mesh_axis is None or size % mesh.shape[mesh_axis] == 0:
                continue
            if axis != "kv_heads":
                name = ".".join(map(str, path))
                raise InputError(
                    f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide axis {axis!r} of {name}, which is "
                    f"{size}: choose a divisor of {size}."
                )
            axes[i] = None
        return variable.replace(NamedSharding(mesh, partition_spec(axes)))

    return nnx.map_state(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every leaf of a Batch: rows over data, fsdp and expert."""
    return NamedSharding(mesh, P(BATCH_AXES))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to lay x out by logical axes; outside of a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
