import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from gemma4_jax.errors import InputError
from gemma4_jax.layers import Buffer
from gemma4_jax.train import checkpoint
from gemma4_jax.train.checkpoint import Checkpoints
from gemma4_jax.train.state import TrainState

STEPS = (2, 4, 6)


def make_state(size: int = 4) -> TrainState:
    """A state that looks like a model's: nested, with a list, a buffer and a moment that is not zero."""
    params = nnx.State(
        {
            "embedder": {"table": nnx.Param(jnp.arange(8.0).reshape(4, 2), axes=("vocab", "embed"))},
            "layers": {0: {"scale": nnx.Param(jnp.ones(size), axes=("norm",))}},
        }
    )
    optimizer = optax.adam(0.1)
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    buffers = nnx.State({"layers": {0: {"bound": Buffer(jnp.array(-jnp.inf), axes=())}}})
    return TrainState(jnp.int32(0), params, buffers, opt_state, jax.random.key(7))


def abstract_of(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def make_iterator() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(100).to_iter_dataset())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Holds checkpoints of STEPS, of which the last two were kept."""
    checkpoints, iterator, state = Checkpoints(tmp_path, keep=2), make_iterator(), make_state()
    for step in range(1, max(STEPS) + 1):
        assert next(iterator) == step - 1
        if step in STEPS:
            checkpoints.save(step, jax.tree.map(lambda x: x, state), iterator)
    checkpoints.close()
    return tmp_path


def test_restores_all_of_it_and_the_data_of_the_same_step(run_dir: Path):
    checkpoints, iterator, state = Checkpoints(run_dir, keep=2), make_iterator(), make_state()
    assert checkpoints.latest_step == 6
    restored = checkpoints.restore(6, abstract_of(state), iterator)
    assert next(iterator) == 6
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored.rng == state.rng
    for given, expected in zip(jax.tree.leaves(restored)[:-1], jax.tree.leaves(state)[:-1], strict=True):
        np.testing.assert_array_equal(given, expected)
        assert given.dtype == expected.dtype
    checkpoints.close()


def test_keeps_the_latest(run_dir: Path):
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["4", "6"]


def test_restores_to_the_sharding_that_is_asked_for(run_dir: Path):
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread if x.ndim else whole), make_state()
    )
    checkpoints = Checkpoints(run_dir, keep=2)
    table = checkpoints.restore(6, wanted, make_iterator()).params["embedder"]["table"].get_value()
    assert table.sharding == spread
    np.testing.assert_array_equal(table, np.arange(8.0).reshape(4, 2))
    checkpoints.close()


def test_no_chunk_is_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "MAX_CHUNK_BYTES", 8)
    checkpoints, state = Checkpoints(tmp_path, keep=1), make_state()
    checkpoints.save(1, state, make_iterator())
    checkpoints.close()
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(tmp_path / "checkpoints" / "1" / "model").item_metadata.tree
    table = metadata["embedder"]["table"]
    assert table.shape == (4, 2)
    assert np.prod(table.storage.chunk_shape) * 4 <= 8
    restored = Checkpoints(tmp_path, keep=1).restore(1, abstract_of(state), make_iterator())
    np.testing.assert_array_equal(restored.params["embedder"]["table"][...], np.arange(8.0).reshape(4, 2))


def test_an_interrupted_save_is_not_seen_and_does_not_stand_in_the_way(run_dir: Path):
    unfinished = run_dir / "checkpoints" / "8.orbax-checkpoint-tmp"
    (unfinished / "model").mkdir(parents=True)
    checkpoints = Checkpoints(run_dir, keep=2)
    assert checkpoints.latest_step == 6
    checkpoints.save(8, make_state(), make_iterator())
    checkpoints.close()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["6", "8"]


def test_a_checkpoint_of_another_model_is_refused(run_dir: Path):
    checkpoints = Checkpoints(run_dir, keep=2)
    reason = r"another model, with layers\.0\.scale \(4,\) and not \(5,\); give another run_dir"
    with pytest.raises(InputError, match=reason):
        checkpoints.restore(6, abstract_of(make_state(size=5)), make_iterator())
    checkpoints.close()


def test_what_the_data_says_is_not_said_of_the_checkpoint(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise InputError("The data is not what it was.")

    checkpoints = Checkpoints(run_dir, keep=2)
    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(InputError, match=r"^The data is not what it was\.$"):
        checkpoints.restore(6, abstract_of(make_state()), make_iterator())
    checkpoints.close()


def test_a_damaged_checkpoint_is_refused(run_dir: Path):
    for file in (run_dir / "checkpoints" / "6" / "data").iterdir():
        file.unlink()
    checkpoints = Checkpoints(run_dir, keep=2)
    with pytest.raises(InputError, match=r"checkpoint .*6 cannot be restored: .*delete that folder to go on"):
        checkpoints.restore(6, abstract_of(make_state()), make_iterator())
    shutil.rmtree(run_dir / "checkpoints" / "6" / "model")
    with pytest.raises(InputError, match=r"checkpoint .*6 cannot be read: .*delete that folder to go on"):
        checkpoints.restore(6, abstract_of(make_state()), make_iterator())
    checkpoints.close()
