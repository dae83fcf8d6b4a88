"""The Python API: load, process, call, generate, save, on a small exported model."""

import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import PIL.Image
import pytest
from flax import nnx

import gemma4_jax
from gemma4_jax import processes, sizes
from gemma4_jax.errors import InputError
from gemma4_jax.hf.names import tensors
from gemma4_jax.sharding import make_mesh
from tests import conversations
from tests.hf import checkpoints

CONFIG = sizes.quickstart()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release in miniature: every tensor that one has, a chat template, a tokenizer, and stop tokens."""
    return checkpoints.write_release(tmp_path_factory.mktemp("release") / "in", CONFIG)


@pytest.fixture(scope="module")
def loaded(folder):
    return gemma4_jax.load_hf(folder)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)


def test_a_model_as_it_is_stored(loaded, folder):
    model, processor = loaded
    assert model.config == CONFIG
    assert model.embedder.table[...].dtype == np.float32
    assert processor.max_soft_tokens == 70
    assert processor.stop_tokens == (1, 6)
    half, _ = gemma4_jax.load_hf(folder, dtype="bfloat16")
    assert half.embedder.table[...].dtype == half.embedder.dtype == jax.numpy.bfloat16


def test_every_tensor_comes_back_bit_for_bit(loaded, folder, tmp_path):
    """Also those of KV-shared layers, which no model uses, and the files beside the weights."""
    gemma4_jax.save_hf(*loaded, tmp_path / "out")
    given, expected = checkpoints.stored(tmp_path / "out"), checkpoints.stored(folder)
    assert given == expected
    assert any(tensor.is_redundant and tensor.name in given for tensor in tensors(CONFIG))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    again = gemma4_jax.load_hf(tmp_path / "out")
    assert again[0].config == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dtypes_that_differ_come_back_bit_for_bit(loaded, tmp_path):
    """Parameters have the dtypes in which they are stored; the model computes as with all of them in float32."""

    def half_of_it(name: str, array: np.ndarray) -> np.ndarray:
        return array if array.ndim < 2 or "vision" in name else array.astype(ml_dtypes.bfloat16)

    folder = checkpoints.write_release(tmp_path / "in", CONFIG, half_of_it)
    model, processor = gemma4_jax.load_hf(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"bfloat16", "float32"}
    gemma4_jax.save_hf(model, processor, tmp_path / "out")
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(folder)
    batch = processor("Hello there.")
    wide, _ = gemma4_jax.load_hf(folder, dtype="float32")
    np.testing.assert_array_equal(model(batch), wide(batch))
    assert gemma4_jax.generate(model, processor, "Hello", max_new_tokens=3)


def test_a_process_that_fails_tells_the_others(loaded, tmp_path, monkeypatch):
    """Whenever that is, and it tells them once; here the other one is a record of what it would be told."""
    told: list[int] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    tell = lambda is_well: told.append(int(is_well)) or is_well  # noqa: E731
    monkeypatch.setattr("gemma4_jax.processes.multihost_utils.broadcast_one_to_all", tell)
    gemma4_jax.save_hf(*loaded, tmp_path / "out")
    assert told == [1, 1]
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        told.clear()
        with pytest.raises(InputError):
            gemma4_jax.save_hf(*loaded, place)
        assert told in ([1, 0], [0])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(InputError, match="the first process failed"), processes.led_by_first():
        monkeypatch.setattr("gemma4_jax.processes.multihost_utils.broadcast_one_to_all", np.zeros_like)


def test_logits_on_a_mesh_are_those_of_one_device(loaded, folder):
    model, processor = loaded
    batch = processor(["Hello there.", "def main("])
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    spread, _ = gemma4_jax.load_hf(folder, mesh=mesh)
    assert spread.embedder.table[...].sharding.mesh == mesh
    with jax.set_mesh(mesh):
        given = np.asarray(spread(batch))
        with pytest.raises(InputError, match=r"a batch of 1 rows does not spread over 2 devices \(data, fsdp"):
            spread(processor("Hello there."))
    expected = np.asarray(model(batch))
    assert expected.shape == (2, batch.tokens.shape[1], CONFIG.text.vocab_size)
    assert np.abs(given - expected).max() <= 1e-5 * np.abs(expected).max()  # float32, as in tests/hf/test_golden.py


def test_rows_of_every_kind_of_input(loaded, picture, tmp_path):
    _, processor = loaded
    roles = CONFIG.tokens
    PIL.Image.fromarray(picture).save(tmp_path / "picture.png")
    file = tmp_path / "picture.png"
    same = [picture, PIL.Image.fromarray(picture), file, str(file), file.read_bytes()]
    rows = [processor("See <|image|>.", images=[image]) for image in same]
    for row in rows[1:]:
        jax.tree.map(np.testing.assert_array_equal, row, rows[0])
    inside = processor([{"role": "user", "content": [{"type": "image", "image": picture}]}])
    beside = processor([{"role": "user", "content": [{"type": "image"}]}], images=[picture])
    jax.tree.map(np.testing.assert_array_equal, inside, beside)

    ids = rows[0].tokens[0].tolist()
    assert ids[0] == roles.bos
    assert ids.count(roles.image) == rows[0].image_slots.max() + 1
    assert ids[ids.index(roles.image) - 1] == roles.begin_image
    given = processor(tokens=ids, images=[picture])
    np.testing.assert_array_equal(given.tokens, rows[0].tokens)
    np.testing.assert_array_equal(given.patches, rows[0].patches)
    two = processor(tokens=[ids, [2, 30]], images=[[picture], []])
    np.testing.assert_array_equal(two.segment_ids.sum(axis=1), [len(ids), 2])
    learned = rows[0].targets[rows[0].loss_weights > 0]
    assert roles.image not in learned
    assert learned[-1] == ids[-1]


def test_a_list_of_conversations_is_a_batch(loaded):
    _, processor = loaded
    messages = [conversations.user("Hi."), conversations.assistant("Hello!")]
    batch = processor([messages, messages[:1]], add_generation_prompt=True)
    assert batch.tokens.shape[0] == 2
    learned = batch.targets[0][batch.loss_weights[0] > 0].tolist()
    assert processor.decode(learned) == "Hello!<turn|>"
    assert not batch.loss_weights[1].any()


def nested(depth: int) -> list:
    value: list = [1]
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "inputs or tokens"),
        ({"inputs": "a", "tokens": [1]}, "inputs or tokens"),
        ({"inputs": []}, "no input"),
        ({"inputs": 7}, "an input must be"),
        ({"inputs": "no place", "images": ["x.png"]}, "0 places for images, and 1 are given"),
        ({"inputs": "<|image|>"}, "1 places for images, and 0 are given"),
        ({"inputs": "<|image|>", "images": ["/nowhere/x.png"]}, "/nowhere/x.png cannot be read: no such file"),
        ({"inputs": "<|image|>", "images": [b"not a picture"]}, "cannot be decoded"),
        ({"inputs": "<|image|>", "images": [3]}, "an image cannot be int"),
        ({"inputs": "<|image|>", "images": [np.zeros((4, 4))]}, r"cannot be float64 \[4, 4\]"),
        ({"inputs": "<|image|>", "images": ["https://a/cat.png"]}, "cat.png is a URL.*: download it first"),
        ({"inputs": "<|image|>", "images": np.zeros((8, 8, 3), np.uint8)}, r"write images=\[image\]\."),
        ({"inputs": "<|image|>", "images": PIL.Image.new("RGB", (8, 8))}, r"write images=\[image\]\."),
        ({"inputs": "<|image|>", "images": "cat.png"}, r"write images=\[image\]\."),
        ({"inputs": [conversations.user(None)], "images": "cat.png"}, r"write images=\[image\]\."),
        ({"inputs": ["<|image|>", "b"], "images": ["cat.png", None]}, r"write images=\[\[image\], \[\]\]\."),
        (
            {"inputs": ["<|image|>", "b"], "images": np.zeros((2, 8, 8, 3), np.uint8)},
            r"write images=\[\[image\], \[\]\]",
        ),
        ({"inputs": "<|audio|>", "audios": np.zeros(400)}, r"write audios=\[audio\]\."),
        ({"tokens": [2, 8], "images": np.zeros((8, 8, 3), np.uint8)}, r"write images=\[image\]\."),
        ({"tokens": [[2, [3]]]}, "rows of token ids"),
        ({"tokens": [2, [3]]}, "rows of token ids"),
        ({"tokens": nested(3000)}, "rows of token ids"),
        ({"inputs": "hi", "max_new_token": 4}, "max_new_token cannot be used here: only conversations"),
        ({"inputs": ["hi"], "tools": [conversations.WEATHER]}, "tools cannot be used here"),
        ({"tokens": [2, 30], "enable_thinking": True}, "enable_thinking cannot be used here"),
        ({"inputs": ["a", "b"], "images": [[]]}, "given for 1 inputs, and there are 2"),
        ({"tokens": [2, 8]}, "1 placeholders, and its 0 images 0"),
        ({"tokens": [2, -8]}, "rows of token ids"),
        ({"tokens": [2, 99999]}, "99999, and the vocabulary ends at 1023"),
        ({"inputs": "Listen: <|audio|>"}, "1 places for sounds, and 0 are given"),
        ({"inputs": "Listen: <|audio|>", "audios": [np.zeros(400)]}, "no audio tower"),
        ({"tokens": [2, CONFIG.tokens.audio]}, "1 placeholders, and its 0 sounds 0"),
        ({"tokens": [2, CONFIG.tokens.video]}, "a place for a video"),
        ({"tokens": [2.5]}, "rows of token ids"),
    ],
)
def test_bad_inputs(arguments, reason, loaded):
    with pytest.raises(InputError, match=reason):
        loaded[1](**arguments)


def test_none_stands_for_no_images(loaded, picture):
    batch = loaded[1](["<|image|>", "b"], images=[(picture,), None])
    assert batch.image_slots[0].max() >= 0 > batch.image_slots[1].max()


def test_arguments_that_generate_does_not_have(loaded):
    with pytest.raises(InputError, match="max_new_token cannot be used here"):
        gemma4_jax.generate(*loaded, "Hello", max_new_token=4)


def test_images_twice(loaded, picture):
    message = {"role": "user", "content": [{"type": "image", "image": picture}]}
    with pytest.raises(InputError, match="each image once"):
        loaded[1]([message], images=[picture])


def change(folder: Path, target: Path, **files: str) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        (target / name.replace("__", ".")).write_text(content)
    return target


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("generation_config__json", '{"eos_token_id": "x"}', "eos_token_id='x' must be a token id"),
        ("generation_config__json", "[]", "must be a JSON object"),
        ("processor_config__json", '{"image_processor": {"max_soft_tokens": 71}}', "max_soft_tokens=71"),
        ("chat_template__jinja", "{% if %}", "chat template cannot be read"),
        ("tokenizer__json", "{}", "cannot be read as a tokenizer.json"),
    ],
)
def test_a_folder_with_a_bad_file(name, content, reason, folder, tmp_path):
    with pytest.raises(InputError, match=reason):
        gemma4_jax.load_hf(change(folder, tmp_path / "changed", **{name: content}))


def test_a_dtype_that_no_model_has(folder):
    with pytest.raises(InputError, match="dtype=float16 is not possible"):
        gemma4_jax.load_hf(folder, dtype="float16")


def test_without_a_chat_template(folder, tmp_path):
    target = change(folder, tmp_path / "base")
    (target / "chat_template.jinja").unlink()
    _, processor = gemma4_jax.load_hf(target)
    with pytest.raises(InputError, match="no chat template"):
        processor([conversations.user("Hi.")])


README = Path(__file__).parents[2] / "README.md"


def test_the_example_in_the_readme(folder, tmp_path, picture, monkeypatch, capsys):
    """As it stands there, with a small model in place of the one that it names."""
    (example,) = re.findall(r"```python\n(import gemma4_jax\n.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    change(folder, tmp_path / "gemma-4-E2B-it")
    PIL.Image.fromarray(picture).save("cat.png")
    names: dict = {}
    exec(example, names)
    assert names["logits"].shape == (1, names["batch"].tokens.shape[1], CONFIG.text.vocab_size)
    assert capsys.readouterr().out.strip()
    assert json.loads(Path("copy/config.json").read_text())["model_type"] == "gemma4"
