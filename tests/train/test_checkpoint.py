import dataclasses
import re
import resource
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

from gemma4_jax.checkpoints.integrity import CHECKSUMS, FROZEN, newest_intact, verify
from gemma4_jax.checkpoints.parameters import CheckpointParameters
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
            "layers": {0: {"scale": nnx.Param(jnp.ones(size), axes=("embed",))}},
        }
    )
    optimizer = optax.adam(0.1)
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    buffers = nnx.State({"layers": {0: {"bound": Buffer(jnp.array(-jnp.inf), axes=())}}})
    return TrainState(jnp.int32(0), params, buffers, opt_state)


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
    for given, expected in zip(jax.tree.leaves(restored)[:-1], jax.tree.leaves(state)[:-1], strict=True):
        np.testing.assert_array_equal(given, expected)
        assert given.dtype == expected.dtype
    checkpoints.close()


def test_what_no_step_changes_is_written_once_and_is_part_of_every_checkpoint(run_dir: Path):
    names = {path.split("/")[-1] for path in CheckpointParameters(run_dir, 6).shapes}
    assert names == {"embedder.table", "layers.0.scale", "layers.0.bound"}
    stored = {path.name for path in (run_dir / FROZEN).iterdir()}
    assert stored >= {"model", CHECKSUMS}
    before = {path: path.stat().st_mtime_ns for path in (run_dir / FROZEN).rglob("*")}
    checkpoints = Checkpoints(run_dir, keep=2)
    checkpoints.save(8, make_state(), make_iterator())
    checkpoints.close()
    assert {path: path.stat().st_mtime_ns for path in (run_dir / FROZEN).rglob("*")} == before
    flip(next(path for path in (run_dir / FROZEN / "model").rglob("*") if path.is_file() and path.stat().st_size))
    with pytest.raises(InputError, match=rf"{run_dir / FROZEN}, a part of every checkpoint of this run, is damaged"):
        newest_intact(run_dir)


def test_what_a_start_without_a_checkpoint_left_is_replaced(tmp_path: Path):
    (tmp_path / FROZEN / "model").mkdir(parents=True)
    (tmp_path / FROZEN / "model" / "half").write_text("half")
    checkpoints, state = Checkpoints(tmp_path, keep=1), make_state()
    checkpoints.save(1, state, make_iterator())
    checkpoints.wait()
    assert not (tmp_path / FROZEN / "model" / "half").exists()
    restored = checkpoints.restore(1, abstract_of(state), make_iterator())
    assert restored.frozen["layers"][0]["bound"].get_value() == -jnp.inf
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
    table = checkpoints.restore(6, wanted, make_iterator()).trained["embedder"]["table"].get_value()
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
    np.testing.assert_array_equal(restored.trained["embedder"]["table"][...], np.arange(8.0).reshape(4, 2))


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


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES = {flip: "are not those that were written", halve: "bytes of", empty: "0 bytes of", Path.unlink: "missing"}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_any_damage_to_any_file_is_found_and_the_one_before_is_taken(run_dir: Path, damage):
    folder, sound = run_dir / "checkpoints" / "6", run_dir / "sound"
    folder.rename(sound)
    files = [file for file in sound.glob("*/**/*") if file.is_file() and file.stat().st_size]
    assert {file.relative_to(sound).parts[0] for file in files} == {"model", "training", "data"}
    for file in files:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        name = file.relative_to(sound).as_posix()
        damage(folder / name)
        reason = (
            rf"^checkpoint {folder} is damaged: .*{re.escape(name)} .*{DAMAGES[damage]}.*; the checkpoint of step 4 is"
        )
        with pytest.warns(UserWarning, match=reason):
            assert newest_intact(run_dir) == 4


def test_a_damaged_checkpoint_is_set_aside_and_its_step_can_be_saved_again(run_dir: Path):
    flip(next((run_dir / "checkpoints" / "6" / "model" / "d").iterdir()))
    with pytest.warns(UserWarning, match="is damaged"):
        checkpoints = Checkpoints(run_dir, keep=2)
    assert checkpoints.latest_step == 4
    iterator, state = make_iterator(), make_state()
    checkpoints.restore(4, abstract_of(state), iterator)
    assert next(iterator) == 4
    checkpoints.save(6, state, iterator)
    checkpoints.close()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["4", "6", "6.damaged"]
    assert verify(run_dir / "checkpoints" / "6").by == "checksums"


def test_where_no_checkpoint_is_intact_nothing_is_restored_or_moved(run_dir: Path):
    for step in ("4", "6"):
        halve(next((run_dir / "checkpoints" / step / "data").glob("*.json")))
    with pytest.raises(
        InputError, match=r"holds no intact checkpoint \(.*6 is damaged: .*4 is damaged: .*restore these"
    ):
        Checkpoints(run_dir, keep=2)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"files": {"model/x": 3}}', '{"files": {"model/x": {"bytes": "1"}}}']
)
def test_a_damaged_list_of_checksums_is_damage(run_dir: Path, content: str):
    folder = run_dir / "checkpoints" / "6"
    (folder / CHECKSUMS).write_text(content)
    assert f"{CHECKSUMS} cannot be read" in (verify(folder).damage or "")


def test_what_orbax_keeps_beside_the_items_is_not_needed(run_dir: Path):
    """It is written after the checksums."""
    for file in (run_dir / "checkpoints" / "6").iterdir():
        if file.is_file() and file.name != CHECKSUMS:
            file.write_bytes(b"{")
    checkpoints = Checkpoints(run_dir, keep=2)
    checkpoints.restore(6, abstract_of(make_state()), make_iterator())
    checkpoints.close()


def test_a_checkpoint_without_checksums_is_restored_with_a_warning_or_refused_in_a_sentence(run_dir: Path, caplog):
    folder = run_dir / "checkpoints" / "6"
    (folder / CHECKSUMS).unlink()
    with pytest.warns(UserWarning, match="6 has no checksums"):
        checkpoints = Checkpoints(run_dir, keep=2)
    checkpoints.restore(6, abstract_of(make_state()), make_iterator())
    for file in (folder / "training" / "d").iterdir():
        halve(file)
    with pytest.raises(InputError, match=r"checkpoint .*6 cannot be read: .*delete that folder to go on"):
        checkpoints.restore(6, abstract_of(make_state()), make_iterator())
    assert not [record for record in caplog.records if record.exc_info]
    checkpoints.close()


def test_sizes_only(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1, checksums=False)
    checkpoints.save(1, make_state(), make_iterator())
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "1"
    assert verify(folder).by == "sizes"
    file = next((folder / "model" / "d").iterdir())
    flip(file)
    assert verify(folder).damage is None
    halve(file)
    assert "bytes of" in (verify(folder).damage or "")


def test_a_save_that_fails_is_one_sentence_and_leaves_the_earlier_ones(run_dir: Path, caplog):
    checkpoints, state = Checkpoints(run_dir, keep=1), make_state(size=1 << 16)
    noise = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(7), x.shape), state.opt_state
    )  # it cannot be compressed
    state = dataclasses.replace(state, opt_state=noise)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # as on a full disk, for files of that size
    try:
        checkpoints.save(8, state, make_iterator())
        with pytest.raises(InputError, match=r"^checkpoint .*/8 could not be saved \(file too large\).* from step 6"):
            checkpoints.save(9, state, make_iterator())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.close()
    assert not [record for record in caplog.records if record.exc_info]
    assert newest_intact(run_dir) == 6
