import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from gemma4_jax import sizes
from gemma4_jax.checkpoints import parameters as parameters_module
from gemma4_jax.errors import InputError
from gemma4_jax.hf import save
from gemma4_jax.hf.config import from_hf
from gemma4_jax.hf.leftovers import HOST
from gemma4_jax.hf.load import Checkpoint
from gemma4_jax.hf.save import CARRIED, export_run, export_state
from gemma4_jax.layers import Buffer
from gemma4_jax.sharding import make_mesh, param_shardings
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.checkpoint import Checkpoints
from gemma4_jax.train.state import TrainState
from tests.hf import samples

FILES = {
    "README.md", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def config():
    return sizes.quickstart()


@pytest.fixture(scope="module")
def weights(config):
    return samples.lively_weights(config)


@pytest.fixture(scope="module")
def state(config, weights):
    return nnx.state(samples.model(config, weights))


@pytest.fixture
def export(config, state, tmp_path):
    """A function that exports to a folder, and the folder."""

    def run(folder: Path = tmp_path / "out", **changes) -> Path:
        options = {"tokenizer": Tokenizer.load("bundled"), "max_soft_tokens": 70}
        export_state(state, config, folder, **options | changes)
        return folder

    return run


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(file.read(name)) for name, file in Checkpoint(folder).files.items()}


def assert_same(given, expected):
    assert given.keys() == expected.keys()
    for name, array in given.items():
        assert array.dtype == expected[name].dtype, name
        assert array.tobytes() == expected[name].tobytes(), name


def test_every_tensor_bit_for_bit(export, config, weights):
    folder = export()
    assert {path.name for path in folder.iterdir()} == FILES | {"model.safetensors"}
    assert_same(stored(folder), weights)
    assert from_hf(json.loads((folder / "config.json").read_text())) == config
    assert (folder / "tokenizer.json").read_bytes() == Tokenizer.load("bundled").path.read_bytes()


def test_bfloat16(export, weights):
    folder = export(dtype="bfloat16")
    assert_same(stored(folder), {name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()})
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_dtype_is_refused(export, tmp_path):
    with pytest.raises(InputError, match=r"float16.*float32 or bfloat16"):
        export(dtype="float16")
    assert not list(tmp_path.iterdir())


def test_several_shards_and_an_index(export, weights, monkeypatch):
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 600_000)
    folder = export()
    shards = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    assert all(path.stat().st_size < 620_000 for path in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    assert_same(stored(folder), weights)


@pytest.fixture
def run_dir(config, state, tmp_path) -> Path:
    """A run whose last checkpoint holds the state, spread over eight devices, and an older one something else."""
    run_dir = tmp_path / "run"
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    spread = jax.device_put(state, param_shardings(state, mesh))
    checkpoints, iterator = Checkpoints(run_dir, keep=2), iter(grain.MapDataset.range(9).to_iter_dataset())
    params, buffers = nnx.split_state(spread, nnx.Param, Buffer)
    for step, trained in ((1, jax.tree.map(jnp.zeros_like, params)), (10, params)):
        checkpoints.save(step, TrainState(jnp.int32(step), trained, buffers, ()), iterator)
    checkpoints.close()
    model = {section: None if fields is None else vars(fields) for section, fields in vars(config).items()}
    content = {"model": model, "tokenizer": "bundled", "data": {"soft_tokens_per_image": 140}}
    (run_dir / "config.json").write_text(json.dumps(content))
    return run_dir


def test_a_run_is_exported_from_its_last_checkpoint(run_dir, config, weights, tmp_path):
    export_run(run_dir, tmp_path / "out")
    assert_same(stored(tmp_path / "out"), weights)
    assert from_hf(json.loads((tmp_path / "out" / "config.json").read_text())) == config
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    image_processor = processor["image_processor"]
    assert (image_processor["max_soft_tokens"], image_processor["patch_size"]) == (140, config.vision.patch_size)


def test_a_run_is_exported_with_the_tokenizer_that_it_carries(run_dir, tmp_path):
    content = json.loads((run_dir / "config.json").read_text()) | {"tokenizer": "gone/tokenizer.json"}
    (run_dir / "config.json").write_text(json.dumps(content))
    own = run_dir / "tokenizer" / "tokenizer.json"
    with pytest.raises(InputError, match=rf"copy that tokenizer\.json to {own}"):
        export_run(run_dir, tmp_path / "out")
    own.parent.mkdir()
    own.write_bytes(Tokenizer.load("bundled").path.read_bytes())
    own.with_name("chat_template.jinja").write_text("{{ messages }}")
    export_run(run_dir, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == own.read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_only_a_newer_export_is_kept(run_dir, tmp_path):
    out, checkpoint = tmp_path / "out", run_dir / "checkpoints" / "10" / "model"
    assert export_run(run_dir, out, keeps_newer=True)
    first = (out / "config.json").stat().st_mtime_ns
    assert not export_run(run_dir, out, keeps_newer=True)
    assert (out / "config.json").stat().st_mtime_ns == first
    assert export_run(run_dir, out)
    newer = first + 10**12
    os.utime(checkpoint, ns=(newer, newer))
    assert export_run(run_dir, out, keeps_newer=True)


def test_what_is_not_an_export_is_not_kept_for_one(run_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"not an export of this package \(config.json\)"):
        export_run(run_dir, out, keeps_newer=True)
    (out / "config.json").unlink()
    assert export_run(run_dir, out, keeps_newer=True)


def test_a_run_is_read_in_pieces(run_dir, config, monkeypatch):
    monkeypatch.setattr(parameters_module, "_SLAB_BYTES", 1000)
    parameters = save.CheckpointParameters(run_dir)
    # A table that is spread over devices along its rows was written in as many pieces, and is read in as many.
    start, slab = parameters.slab("embedder.table", 700)
    assert start <= 700 < start + len(slab)
    assert len(slab) < config.text.vocab_size


@pytest.mark.parametrize("slab_bytes", [1000, 10**9])
def test_an_export_keeps_no_copy_of_the_model_on_the_host(slab_bytes, state, config, weights, tmp_path, monkeypatch):
    """np.asarray of an array would leave one in it; nor is more of a stack read than the layers that are written."""
    monkeypatch.setattr(parameters_module, "_SLAB_BYTES", slab_bytes)
    spread = jax.device_put(state, param_shardings(state, make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})))
    save.export_state(spread, config, tmp_path / "out", tokenizer=Tokenizer.load("bundled"), max_soft_tokens=70)
    assert not [leaf.shape for leaf in jax.tree.leaves(spread) if leaf._npy_value is not None]
    assert_same(stored(tmp_path / "out"), weights)
    parameters = save.StateParameters(spread)
    path = next(path for path, shape in parameters.shapes.items() if path.startswith("vision.") and len(shape) == 4)
    start, slab = parameters.slab(path, 1)
    assert (start, len(slab)) == ((1, 1) if slab_bytes == 1000 else (0, parameters.shapes[path][0]))


def test_what_is_not_a_run(run_dir, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="not a run directory"):
        export_run(tmp_path / "nowhere", out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gemma4"}')
    with pytest.raises(InputError, match="not the config of a run"):
        export_run(tmp_path / "other", out)
    content = json.loads((run_dir / "config.json").read_text())
    for model in ({}, {**content["model"], "text": {}}, {**content["model"], "tokens": None}):
        (tmp_path / "other" / "config.json").write_text(json.dumps(content | {"model": model}))
        with pytest.raises(InputError, match="config of a run: model\\.t"):
            export_run(tmp_path / "other", out)
    (tmp_path / "other" / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not JSON"):
        export_run(tmp_path / "other", out)
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        export_run(tmp_path / "other", out)
    (tmp_path / "other" / "config.json").write_bytes((run_dir / "config.json").read_bytes())
    with pytest.raises(InputError, match="no checkpoint"):
        export_run(tmp_path / "other", out)
    for step in ("1", "10"):
        (run_dir / "checkpoints" / step / "model" / "_METADATA").unlink()
    with pytest.raises(InputError, match="no intact checkpoint"):
        export_run(run_dir, out)
    assert not out.exists()


def test_an_earlier_export_is_replaced(export, weights):
    folder = export(dtype="bfloat16")
    export()
    assert_same(stored(folder), weights)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(export, weights, tmp_path):
    (tmp_path / "out").mkdir()
    assert_same(stored(export()), weights)


@pytest.mark.parametrize("foreign", ["notes.txt", "model-1.bin", "config.json"])
def test_a_folder_of_something_else_is_left_alone(foreign, export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / foreign).write_text("{}")
    with pytest.raises(InputError, match=f"not an export.*{foreign}"):
        export()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [foreign]


def test_weights_that_another_program_wrote_are_left_alone(export, tmp_path):
    folder = export()
    (folder / "model.safetensors").unlink()
    save.write_tensor_file(folder / "model.safetensors", [], {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.safetensors"):
        export()


def test_a_file_in_the_place_is_refused(export, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        export()


def test_an_earlier_export_survives_a_failure(export, weights, monkeypatch):
    folder = export()

    def fail(path: Path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_tensor_file", fail)
    with pytest.raises(InputError, match="no space left on device"):
        export(dtype="bfloat16")
    assert_same(stored(folder), weights)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["write_tensor_file", "write_file", "_publish"])
def test_interrupted(moment, export, monkeypatch, tmp_path):
    """Whenever it is stopped, nothing is in its place; what lies beside it has no config.json before all is written."""

    class Killed(BaseException):
        pass

    def stop(path, *_):
        temporary = path if moment == "_publish" else path.parent
        assert not (tmp_path / "out").exists()
        assert (temporary / "config.json").exists() == (moment == "_publish")
        raise Killed

    monkeypatch.setattr(save, moment, stop)
    with pytest.raises(Killed):
        export()
    assert not list(tmp_path.iterdir())


def dead_process() -> str:
    finished = subprocess.Popen(["true"])
    finished.wait()
    return f"{HOST}.{finished.pid}"


def test_what_killed_processes_left_is_removed(export, weights, tmp_path):
    dead, alive, elsewhere = dead_process(), f"{HOST}.{os.getppid()}", "elsewhere.999999999"
    kept = [f".out.{alive}.tmp", f".out.{elsewhere}.tmp", f".other.{dead}.tmp", f".out.{dead}.notes"]
    for name in (f".out.{dead}.tmp", *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / f".out.{dead}.carried.safetensors").write_text("half")
    assert_same(stored(export()), weights)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *kept}


def test_an_export_that_was_moved_aside_goes_back_to_its_place(export, weights, monkeypatch, tmp_path):
    """Also where the next one fails; where another has taken its place, it is removed."""
    folder, aside = export(), tmp_path / f".out.{dead_process()}.old"
    folder.rename(aside)
    with monkeypatch.context() as patch:
        patch.setattr(save.shutil, "disk_usage", lambda folder: SimpleNamespace(free=7))
        with pytest.raises(InputError, match="has room for 7"):
            export(dtype="bfloat16")
    assert_same(stored(folder), weights)
    shutil.copytree(folder, aside)
    export()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_room(export, monkeypatch, tmp_path):
    monkeypatch.setattr(save.shutil, "disk_usage", lambda folder: SimpleNamespace(free=7))
    with pytest.raises(InputError, match="has room for 7"):
        export()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(export, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="failed and left nothing there: "):
        export(tmp_path / "file" / "out")


def test_a_released_tokenizer_is_carried_with_what_lies_beside_it(export, tmp_path):
    beside = {
        "tokenizer_config.json": b'{"a": 1}',
        "chat_template.jinja": b"{{ x }}",
        "generation_config.json": b"{}\n",
    }
    (tmp_path / "released").mkdir()
    beside["tokenizer.json"] = Tokenizer.load("bundled").path.read_bytes()
    for name, content in beside.items():
        (tmp_path / "released" / name).write_bytes(content)
    folder = export(tokenizer=Tokenizer.load(str(tmp_path / "released")))
    for name, content in beside.items():
        assert (folder / name).read_bytes() == content


def test_a_text_model_has_no_processor_and_no_tower(config, tmp_path):
    text_only = dataclasses.replace(config, vision=None)
    state = nnx.state(samples.model(text_only, samples.lively_weights(text_only)))
    export_state(state, text_only, tmp_path / "out", tokenizer=Tokenizer.load("bundled"), max_soft_tokens=70)
    assert not (tmp_path / "out" / "processor_config.json").exists()
    assert Checkpoint(tmp_path / "out").config == text_only


def test_the_name_of_carried_tensors_is_not_one_of_an_export():
    assert CARRIED not in save._OUR_FILES
    assert save._WEIGHTS.fullmatch(CARRIED) is None
