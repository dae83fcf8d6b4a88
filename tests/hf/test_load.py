import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from gemma4_jax import sizes
from gemma4_jax.checkpoints.parameters import flatten_paths
from gemma4_jax.errors import InputError
from gemma4_jax.hf import load, safetensors, save
from gemma4_jax.hf.config import to_hf
from gemma4_jax.hf.load import Checkpoint, load_state, write_carried
from gemma4_jax.hf.names import tensors
from gemma4_jax.hf.processor import processor_config
from gemma4_jax.hf.safetensors import OutgoingTensor, in_blocks, write_tensor_file
from gemma4_jax.hf.save import export_state
from gemma4_jax.model import Gemma4
from gemma4_jax.sharding import make_mesh, param_shardings
from gemma4_jax.tokenizer import Tokenizer
from tests.hf import samples

TOKENIZER = Tokenizer.load("bundled")


@pytest.fixture(scope="module")
def config():
    """Has K and V that are shared, and a vocabulary as large as the bundled tokenizer's."""
    return sizes.quickstart()


@pytest.fixture(scope="module")
def weights(config):
    return samples.lively_weights(config)


def released(weights, config) -> dict[str, np.ndarray]:
    """As a release has it: with tensors for the KV-shared layers that no model uses."""
    rng = np.random.default_rng(5)
    redundant = {t.name: rng.standard_normal(t.shape, np.float32) for t in tensors(config) if t.is_redundant}
    assert redundant
    return weights | redundant


def write(folder: Path, weights, config, **content) -> Path:
    """A checkpoint as somebody else would write it."""
    folder.mkdir()
    names = {dtype: name for name, dtype in safetensors.DTYPES.items()}
    outgoing = [
        OutgoingTensor(name, names[array.dtype], array.shape, partial(in_blocks, array))
        for name, array in weights.items()
    ]
    write_tensor_file(folder / "model.safetensors", outgoing, {"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype)
    (folder / "config.json").write_text(json.dumps(to_hf(config, dtype=dtype, max_soft_tokens=70) | content))
    return folder


@pytest.fixture
def folder(weights, config, tmp_path) -> Path:
    return write(tmp_path / "in", weights, config)


def abstract(config, sizes=None, dtype=jnp.float32) -> nnx.State:
    state = nnx.state(nnx.eval_shape(lambda: Gemma4(config, nnx.Rngs(0), param_dtype=dtype)))
    if sizes is None:
        return state
    shardings = param_shardings(state, make_mesh(sizes))
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state, shardings)


def values(state) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_paths(nnx.to_pure_dict(state)).items()}


def stored(folder: Path) -> dict[str, bytes]:
    return {name: np.array(file.read(name)).tobytes() for name, file in Checkpoint(folder).files.items()}


def test_values(folder, weights, config):
    state = load_state(Checkpoint(folder), abstract(config), config)
    expected = samples.ours(weights, config)
    given = values(state)
    assert given.keys() == expected.keys()
    for path, array in given.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"data": 2, "expert": 4}])
def test_each_device_gets_its_own_shard(mesh, folder, weights, config):
    wanted = abstract(config, mesh)
    state = load_state(Checkpoint(folder), wanted, config)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == want.sharding
    expected = samples.ours(weights, config)
    for path, array in values(state).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_only_what_a_shard_needs_is_read(folder, config, monkeypatch):
    """Reading never makes an array larger than a shard."""
    made = []
    monkeypatch.setattr(load, "_aligned", lambda *args: made.append(np.empty(*args)) or made[-1])
    state = load_state(Checkpoint(folder), abstract(config, {"fsdp": 2, "expert": 2, "tensor": 2}), config)
    largest = max(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert max(array.nbytes for array in made) == largest < 1024 * 64 * 4


def test_values_are_cast(weights, config, tmp_path):
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}
    checkpoint = Checkpoint(write(tmp_path / "in", half, config))
    for dtype in (jnp.float32, jnp.bfloat16):
        state = load_state(checkpoint, abstract(config, dtype=dtype), config)
        expected = samples.ours(half, config)
        for path, array in values(state).items():
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, expected[path].astype(dtype), err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [300_000, 10**9])
def test_in_and_out_bit_for_bit(dtype, shard_bytes, weights, config, tmp_path, monkeypatch):
    """With the redundant tensors of a release, one file or several, through float32 parameters and onward again."""
    cast = {name: array.astype(dtype) for name, array in released(weights, config).items()}
    first = write(tmp_path / "in", cast, config)
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", shard_bytes)
    for target in (tmp_path / "out", tmp_path / "again"):
        checkpoint = Checkpoint(first)
        state = load_state(checkpoint, abstract(config), config)
        write_carried(checkpoint, checkpoint.unused(state), tmp_path / "carried.safetensors")
        options = {"tokenizer": TOKENIZER, "max_soft_tokens": 70, "carried": tmp_path / "carried.safetensors"}
        export_state(state, config, target, dtype=dtype, **options)
        first = target
    assert stored(first) == {name: array.tobytes() for name, array in cast.items()}
    assert len(list(first.glob("*.safetensors"))) > (1 if shard_bytes < 10**9 else 0)


def test_transformers_ignores_the_redundant_tensors(weights, config, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    write(tmp_path / "in", released(weights, config), config)
    _, info = transformers.Gemma4ForConditionalGeneration.from_pretrained(tmp_path / "in", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("left_out", ["vision", "audio"])
def test_a_tower_that_is_left_out_is_carried(left_out, tmp_path):
    config = samples.shrink("e2b", with_audio=True)
    weights = samples.lively_weights(config)
    checkpoint = Checkpoint(write(tmp_path / "in", weights, config))
    smaller = dataclasses.replace(config, **{left_out: None})
    state = load_state(checkpoint, abstract(smaller), smaller)
    names = checkpoint.unused(state)
    assert any(name.startswith(f"model.embed_{left_out}.") for name in names)
    write_carried(checkpoint, names, tmp_path / "carried.safetensors")
    # A model without images has no use for the budget of one, so this is as likely another than that of the source.
    budget = 70 if smaller.vision else 1120
    options = {"tokenizer": TOKENIZER, "max_soft_tokens": budget, "carried": tmp_path / "carried.safetensors"}
    export_state(state, smaller, tmp_path / "out", **options)
    (tmp_path / "out" / "tokenizer.json").unlink()  # it is of a larger vocabulary
    assert stored(tmp_path / "out") == {name: array.tobytes() for name, array in weights.items()}
    given, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "in"))
    assert given[f"{left_out}_config"] == expected[f"{left_out}_config"]
    assert Checkpoint(tmp_path / "out").config == config
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor == processor_config(config.vision, 70)


def test_not_a_number_is_named(weights, config, tmp_path):
    broken = dict(weights)
    for name in ("model.language_model.norm.weight", "model.language_model.layers.2.self_attn.q_proj.weight"):
        broken[name] = broken[name].copy()
        broken[name].flat[3] = np.nan
    checkpoint = Checkpoint(write(tmp_path / "in", broken, config))
    with pytest.warns(UserWarning, match=r"NaN in .*layers\.\{2\}\.self_attn\.q_proj\.weight, .*norm\.weight"):
        load_state(checkpoint, abstract(config), config)


def test_not_a_number_is_named_in_what_is_carried(weights, config, tmp_path):
    broken = released(weights, config)
    name = next(tensor.name for tensor in tensors(config) if tensor.is_redundant)
    broken[name] = np.full_like(broken[name], np.nan)
    checkpoint = Checkpoint(write(tmp_path / "in", broken, config))
    with pytest.warns(UserWarning, match=r"NaN in model\.language_model\.layers\.\{\d\}\.self_attn\.\w+\.weight\.$"):
        write_carried(checkpoint, checkpoint.unused(abstract(config)), tmp_path / "carried.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_has_nan(dtype):
    values = np.linspace(-9, 9, 300).astype(dtype).reshape(3, 100)
    values[1, :2] = np.inf, -np.inf
    assert not safetensors.has_nan(values)
    assert not safetensors.has_nan(values[0, 0])
    assert not safetensors.has_nan(values[:0])
    for nan in (np.nan, -np.nan):
        values[2, 99] = nan
        assert safetensors.has_nan(values)
    assert safetensors.has_nan(values[2, 99, ...])


def test_infinite_clip_bounds_are_no_reason_to_warn(weights, config, tmp_path, recwarn):
    open_ended = {name: np.full_like(a, np.inf) if name.endswith("put_max") else a for name, a in weights.items()}
    load_state(Checkpoint(write(tmp_path / "in", open_ended, config)), abstract(config), config)
    assert not [warning for warning in recwarn if warning.category is UserWarning]


def test_everything_that_is_wrong_is_told_at_once(weights, config, tmp_path):
    damaged = dict(weights)
    for layer in (0, 1, 3):
        del damaged[f"model.language_model.layers.{layer}.mlp.up_proj.weight"]
    del damaged["model.vision_tower.std_bias"]
    damaged["model.head.weight"] = damaged["model.language_model.embed_tokens.weight"]
    damaged["model.language_model.layers.9.layer_scalar"] = np.ones(1, np.float32)
    for layer in (0, 2):
        name = f"model.language_model.layers.{layer}.self_attn.q_proj.weight"
        damaged[name] = damaged[name].T[:, :5].copy()
    with pytest.raises(InputError) as error:
        Checkpoint(write(tmp_path / "in", damaged, config))
    message = str(error.value)
    for part in (
        "4 tensors missing (",
        "model.language_model.layers.{0-1,3}.mlp.up_proj.weight",
        "model.vision_tower.std_bias",
        "2 tensors unexpected (",
        "model.head.weight",
        "layers.{9}.layer_scalar",
        "2 tensors of another shape (",
        "model.language_model.layers.{0,2}.self_attn.q_proj.weight is [64, 5], not [64, 64]",
    ):
        assert part in message
    assert "\n" not in message
    assert message.endswith(".")


def test_redundant_tensors_need_the_right_shape_too(weights, config, tmp_path):
    full = released(weights, config)
    name = next(tensor.name for tensor in tensors(config) if tensor.is_redundant)
    with pytest.raises(InputError, match="1 tensors of another shape"):
        Checkpoint(write(tmp_path / "in", full | {name: np.zeros((3, 3), np.float32)}, config))


def test_another_model_is_refused_with_what_differs(folder, config):
    text = dataclasses.replace(config.text, mlp_dim=96)
    other = dataclasses.replace(config, text=text)
    with pytest.raises(InputError, match=r"text\.mlp_dim is 128, and 96 in the model\.$"):
        load_state(Checkpoint(folder), abstract(other), other)
    with_audio = dataclasses.replace(config, audio=samples.shrink("e2b", with_audio=True).audio)
    with pytest.raises(InputError, match=r"audio\.embed_dim is None, and 16 in the model"):
        load_state(Checkpoint(folder), abstract(with_audio), with_audio)


def test_settings_that_change_no_tensor_may_differ(folder, config):
    text = dataclasses.replace(config.text, sliding_window=32, max_positions=99)
    load_state(Checkpoint(folder), abstract(config), dataclasses.replace(config, text=text))


def test_a_vocabulary_larger_than_the_embedding(weights, tmp_path):
    config = samples.shrink("31b")
    folder = write(tmp_path / "in", samples.lively_weights(config), config)
    shutil.copy(TOKENIZER.path, folder)
    with pytest.raises(InputError, match=r"tokenizer\.json has 1024 tokens, and the embedding of the model 160"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"9" * 5000, "is not JSON"),
        (b'{"model_type": "llama"}', "model_type='llama' is not supported"),
        (b"[]", "must be an object"),
    ],
)
def test_a_hostile_config(content, reason, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        Checkpoint(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        Checkpoint(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="it is not a checkpoint"):
        Checkpoint(folder)


@pytest.fixture
def sharded(weights, config, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 900_000)
    state = nnx.state(samples.model(config, weights))
    export_state(state, config, tmp_path / "in", tokenizer=TOKENIZER, max_soft_tokens=70)
    return tmp_path / "in"


def change_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    "target", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "config.json", "a\0b.safetensors"]
)
def test_an_index_that_points_outside_its_folder(target, sharded):
    change_index(sharded, lambda index: index["weight_map"].update({NORM: target}))
    with pytest.raises(InputError, match="only safetensors files in its own folder are read"):
        Checkpoint(sharded)


def test_hostile_indices(sharded):
    index = sharded / "model.safetensors.index.json"
    good = index.read_bytes()
    first, second = sorted(path.name for path in sharded.glob("*.safetensors"))[:2]
    for content in ([], {}, {"weight_map": []}, {"weight_map": {NORM: 3}}):
        index.write_text(json.dumps(content))
        with pytest.raises(InputError, match="has no weight_map"):
            Checkpoint(sharded)
    index.write_bytes(good)
    change_index(sharded, lambda content: content["weight_map"].update({NORM: "model-00009-of-00009.safetensors"}))
    with pytest.raises(InputError, match="cannot be read: no such file"):
        Checkpoint(sharded)
    index.write_bytes(good)
    change_index(sharded, lambda content: content["weight_map"].pop(NORM))
    with pytest.raises(InputError, match=f"does not say where these tensors are: {re.escape(NORM)}"):
        Checkpoint(sharded)
    index.write_bytes(good)
    shutil.copy(sharded / first, sharded / second)
    with pytest.raises(InputError, match="repeats tensors of other files"):
        Checkpoint(sharded)


def test_a_shard_that_is_missing_from_the_index_is_missing(sharded):
    last = sorted(path.name for path in sharded.glob("*.safetensors"))[-1]

    def forget(index):
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != last}

    change_index(sharded, forget)
    with pytest.raises(InputError, match=r"\d+ tensors missing"):
        Checkpoint(sharded)


def test_carried_file_is_whole_or_absent(folder, config, tmp_path, monkeypatch):
    checkpoint = Checkpoint(folder)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma4_jax.hf.load.write_tensor_file", stop)
    with pytest.raises(KeyboardInterrupt):
        write_carried(checkpoint, [], tmp_path / "carried.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_two_processes_share_the_work(weights, config, tmp_path):
    """Each reads its own shards, and together they write what one would have written."""
    state = nnx.state(samples.model(config, weights))
    export_state(state, config, tmp_path / "in", tokenizer=TOKENIZER, max_soft_tokens=70)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-m", "tests.hf.two_processes"]
    processes = [
        subprocess.Popen(
            [*command, str(process), str(port), tmp_path / "in", tmp_path / "out"],
            cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    for path in (tmp_path / "in").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


HEAD, TABLE = "lm_head.weight", "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stored_head_that_is_the_embedding(dtype, weights, config, tmp_path):
    cast = {name: array.astype(dtype) for name, array in weights.items()}
    checkpoint = Checkpoint(write(tmp_path / "in", cast | {HEAD: cast[TABLE]}, config))
    assert checkpoint.files.keys() == weights.keys()
    loaded = values(load_state(checkpoint, abstract(config), config))
    np.testing.assert_array_equal(loaded["embedder.table"], cast[TABLE].astype(np.float32))


@pytest.mark.parametrize("place", [0, -1])
def test_a_head_of_its_own_is_refused(place, weights, config, tmp_path):
    head = weights[TABLE].copy()
    head.reshape(-1)[place] += 1
    with pytest.raises(
        InputError, match=r"lm_head\.weight is not the token embedding, and only models whose head is tied"
    ):
        Checkpoint(write(tmp_path / "in", weights | {HEAD: head}, config))
    with pytest.raises(InputError, match="is not the token embedding"):
        Checkpoint(write(tmp_path / "other", weights | {HEAD: head[:-1]}, config))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(name, folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"
    (folder / name).write_text(pointer)
    with pytest.raises(InputError, match=rf"{name} is a git-lfs pointer.*run `git lfs pull`"):
        Checkpoint(folder)
