"""Conversion: streamed, exact, movable, and refused as a whole."""

import json
import math
import resource
import shutil
import subprocess
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import gemma4_jax
from gemma4_jax import sizes
from gemma4_jax.checkpoints import streaming
from gemma4_jax.checkpoints.streaming import StreamedArray
from gemma4_jax.errors import InputError
from gemma4_jax.hf import save
from gemma4_jax.hf.convert import convert
from gemma4_jax.hf.leftovers import HOST
from gemma4_jax.hf.load import Checkpoint, load_state
from gemma4_jax.hf.names import tensors
from gemma4_jax.hf.save import export_run
from gemma4_jax.model import Gemma4
from gemma4_jax.sharding import make_mesh, param_shardings
from tests.hf import checkpoints

CONFIG = sizes.quickstart()
GATE = "mlp.gate_proj.linear.weight"
NORM = "model.language_model.norm.weight"


def in_bfloat16(_: str, array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)


def mixed(name: str, array: np.ndarray) -> np.ndarray:
    """Matrices in bfloat16, the rest in float32, and the gates of one layer too."""
    return array if array.ndim < 2 or name.endswith(f"encoder.layers.0.{GATE}") else in_bfloat16(name, array)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return checkpoints.write_release(tmp_path_factory.mktemp("release") / "in", CONFIG, in_bfloat16)


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(release, out)
    return out


def test_bfloat16_stays_bfloat16_and_comes_back_bit_for_bit(converted, release, tmp_path):
    size = sum(path.stat().st_size for path in (converted / "checkpoints").rglob("*") if path.is_file())
    assert size < 1.2 * (release / "model.safetensors").stat().st_size
    export_run(converted, tmp_path / "out")
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(release)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    redundant = {tensor.name for tensor in tensors(CONFIG) if tensor.is_redundant}
    assert redundant
    assert redundant <= checkpoints.stored(tmp_path / "out").keys()


def test_a_converted_folder_can_be_moved(converted, release, tmp_path, monkeypatch):
    shutil.copytree(converted, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    export_run("moved", "out")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (release / name).read_bytes()
    assert str(converted.parent) not in (tmp_path / "moved" / "config.json").read_text()


def test_dtypes_that_differ(tmp_path):
    """A parameter is stored in bfloat16 if all its tensors are; so nothing is rounded, and what can stay does."""
    release = checkpoints.write_release(tmp_path / "in", CONFIG, mixed)
    convert(release, tmp_path / "converted")
    export_run(tmp_path / "converted", tmp_path / "out")
    given, expected = checkpoints.stored(tmp_path / "out"), checkpoints.stored(release)
    assert given.keys() == expected.keys()
    wider = {name for name in given if given[name] != expected[name]}
    assert wider
    assert all(name.endswith(GATE) and given[name][0] == "F32" for name in wider)
    for name in wider:
        values = np.frombuffer(expected[name][2], ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.frombuffer(given[name][2], np.float32), values.astype(np.float32))


def test_orbax_restores_it_on_a_mesh_and_in_float32(converted, release):
    abstract = nnx.state(nnx.eval_shape(lambda: Gemma4(CONFIG, nnx.Rngs(0))))
    to = param_shardings(abstract, make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}))
    wanted = jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), abstract, to)
    with ocp.StandardCheckpointer() as checkpointer:
        given = checkpointer.restore(converted / "checkpoints" / "0" / "model", nnx.to_pure_dict(wanted))
    expected = nnx.to_pure_dict(load_state(Checkpoint(release), wanted, CONFIG))
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
        np.testing.assert_array_equal(one, other)


def test_several_files_in_and_out(converted, release, tmp_path, monkeypatch):
    """With an index, through a conversion, and into transformers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 300_000)
    export_run(converted, tmp_path / "several")
    assert len(list((tmp_path / "several").glob("model-*.safetensors"))) > 2
    convert(tmp_path / "several", tmp_path / "again")
    export_run(tmp_path / "again", tmp_path / "out")
    for path in (tmp_path / "several").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    model, info = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    for name, values in model.state_dict().items():
        if name in checkpoints.stored(release):
            assert values.reshape(-1).view(torch.uint8).numpy().tobytes() == checkpoints.stored(release)[name][2]


def test_no_more_than_a_few_pieces_are_in_memory(converted, release, tmp_path, monkeypatch):
    """However large an array is, it is made in pieces, and few of them wait to be written."""
    monkeypatch.setattr(streaming, "MAX_CHUNK_BYTES", 5000)
    monkeypatch.setattr(streaming, "MAX_PENDING_BYTES", 10_000)
    made: list[int] = []
    read = StreamedArray.read_piece
    monkeypatch.setattr(
        StreamedArray, "read_piece", lambda self, index: (piece := read(self, index), made.append(piece.nbytes))[0]
    )
    convert(release, tmp_path / "converted")
    assert max(made) <= 5000
    export_run(tmp_path / "converted", tmp_path / "out")
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(release)


@pytest.mark.parametrize("shape", [(), (7,), (3, 50), (4, 2, 9, 5), (1000, 3)])
def test_pieces_cover_an_array_once(shape, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_CHUNK_BYTES", 60)
    array = StreamedArray(shape, np.dtype(np.float32), lambda _: np.zeros(()))
    count = np.zeros(shape, int)
    for index in array.indices():
        count[index] += 1
    assert (count == 1).all()
    assert math.prod(array.chunk_shape) * 4 <= 60


def test_not_a_number_is_named(tmp_path):
    def change(name: str, array: np.ndarray) -> np.ndarray:
        return np.where(np.arange(array.size).reshape(array.shape) == 3, np.nan, array) if name == NORM else array

    release = checkpoints.write_release(
        tmp_path / "in", CONFIG, lambda name, array: in_bfloat16(name, change(name, array))
    )
    with pytest.warns(UserWarning, match=r"NaN in model\.language_model\.norm\.weight\.$"):
        convert(release, tmp_path / "out")
    export_run(tmp_path / "out", tmp_path / "again")
    assert checkpoints.stored(tmp_path / "again") == checkpoints.stored(release)


def test_leftovers_of_a_killed_conversion_are_removed(release, tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    (tmp_path / f".out.{HOST}.{killed.pid}.tmp").mkdir()
    convert(release, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_room_that_is_asked_for_is_what_is_written(tmp_path, monkeypatch):
    """Layers of one parameter that are stored in two dtypes are written in the wider one."""
    release = checkpoints.write_release(tmp_path / "in", CONFIG, mixed)
    asked: list[int] = []
    monkeypatch.setattr("gemma4_jax.hf.convert.check_space", lambda _, num_bytes: asked.append(num_bytes))
    convert(release, tmp_path / "converted")
    export_run(tmp_path / "converted", tmp_path / "out")
    written = sum(len(content) for _, _, content in checkpoints.stored(tmp_path / "out").values())
    assert asked == [written]
    assert written > sum(len(content) for _, _, content in checkpoints.stored(release).values())


def test_a_disk_that_is_full(release, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InputError, match="out cannot be written and nothing was left there: ") as error:
            convert(release, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(save.shutil, "disk_usage", lambda _: type("usage", (), {"free": 7}))
    with pytest.raises(InputError, match="has room for 7"):
        convert(release, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def edit_header(folder: Path, change) -> None:
    """Changes the header of the weights without changing the bytes of the tensors."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def point_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {NORM: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def move(header, by: int) -> None:
    entry = header[NORM]
    entry["data_offsets"] = [entry["data_offsets"][0] + by, entry["data_offsets"][1] + by]


FAULTS = {
    "a truncated file": (cut_short, "is cut short"),
    "a shape that lies": (lambda f: edit_header(f, lambda h: h[NORM].update(shape=[1000])), "needs 2000 bytes"),
    "offsets that lie": (
        lambda f: edit_header(f, lambda h: h[NORM].update(data_offsets=[0, 2])),
        r"norm\.weight of shape \[64\] needs 128 bytes, and the header gives it 2",
    ),
    "tensors that overlap": (lambda f: edit_header(f, lambda h: move(h, -2)), "overlaps the one before it"),
    "a tensor out of range": (lambda f: edit_header(f, lambda h: move(h, 2**40)), "leaves a gap before it"),
    "a huge header": (huge_header, "claims a header of 1099511627776 bytes"),
    "an index that points outside": (point_outside, "only safetensors files in its own folder are read"),
    "another architecture": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="llama")),
        "model_type='llama' is not supported",
    ),
    "another size": (
        lambda f: edit_json(f / "config.json", lambda c: c["text_config"].update(intermediate_size=96)),
        r"tensors of another shape .*mlp\.up_proj\.weight is \[",
    ),
    "a dtype that is not read": (
        lambda f: edit_header(f, lambda h: h[NORM].update(dtype="I16")),
        "has dtype I16, and only F32, F16, BF16 are read",
    ),
    "a tokenizer larger than the embedding": (
        lambda f: edit_json(f / "tokenizer.json", lambda c: c["model"]["vocab"].update({"zzzz": 5000})),
        "tokenizer.json has 5001 tokens, and the embedding of the model 1024",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused_and_the_destination_stays(fault, release, tmp_path):
    damage, reason = FAULTS[fault]
    folder = tmp_path / "in"
    shutil.copytree(release, folder)
    damage(folder)
    (tmp_path / "place").mkdir()
    for read in (lambda: convert(folder, tmp_path / "place" / "out"), lambda: gemma4_jax.load_hf(folder)):
        with pytest.raises(InputError, match=reason) as error:
            read()
        message = str(error.value)
        assert "\n" not in message
        assert message.endswith(".")
    assert not list((tmp_path / "place").iterdir())
