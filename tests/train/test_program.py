import collections
import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from gemma4_jax.errors import InputError
from gemma4_jax.sharding import MESH_AXES, make_mesh
from gemma4_jax.train.program import batch_part
from tests.test_sharding import chips


@pytest.mark.parametrize(
    ("sizes", "sides", "num_parts"),
    [
        ({"fsdp": 16}, (4, 4, 1), 4),  # a host has four shards of rows
        ({"fsdp": 8, "context": 8}, (4, 4, 4), 8),  # finetune_e4b_long: two hosts have positions of one row
        ({"fsdp": 16, "context": 16}, (4, 8, 8), 16),  # finetune_31b_long
        ({"data": 2, "fsdp": 32, "tensor": 4}, (4, 8, 8), 32),  # two hosts have heads of two rows
        ({"context": 16}, (4, 4, 1), 1),
    ],
)
def test_hosts_of_the_same_rows_read_the_same_part_of_a_batch(sizes, sides, num_parts, monkeypatch):
    """Hosts of 2 x 2 chips, as a TPU v5p has them."""
    hosts = sorted({(x // 2, y // 2, z) for x, y, z in (chip.coords for chip in chips(*sides))})
    mesh = make_mesh(sizes, [_on_host(chip, hosts) for chip in chips(*sides)])
    num_rows = mesh.shape["data"] * mesh.shape["fsdp"]
    rows_of = collections.defaultdict(set)
    for host in range(len(hosts)):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        part, count = batch_part(mesh)
        assert count == num_parts
        devices = mesh.devices.reshape(num_rows, -1)
        rows_of[part].add(tuple(i for i in range(num_rows) if host in {chip.process_index for chip in devices[i]}))
    assert all(len(rows) == 1 for rows in rows_of.values())
    assert sorted(row for rows in rows_of.values() for row in min(rows)) == list(range(num_rows))


def _on_host(chip, hosts):
    x, y, z = chip.coords
    return dataclasses.replace(chip, process_index=hosts.index((x // 2, y // 2, z)))


def test_rows_that_hosts_do_not_share_evenly_are_refused():
    """Three shards of rows, of four devices each, on two hosts of six."""
    devices = [dataclasses.replace(chip, process_index=chip.id // 6) for chip in chips(3, 4, 1)]
    mesh = Mesh(np.array(devices).reshape(1, 3, 1, 4, 1), MESH_AXES)
    with pytest.raises(InputError, match=r"over 3 devices .*, which 2 processes do not share evenly: let each have"):
        batch_part(mesh)
