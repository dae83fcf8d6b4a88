"""Checkpoints of the decoder alone: other names, a config.json without sections, and otherwise like every other."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import gemma4_jax
from gemma4_jax import sizes
from gemma4_jax.errors import InputError
from gemma4_jax.hf.load import Checkpoint
from gemma4_jax.hf.safetensors import TensorFile
from gemma4_jax.hf.save import export_state
from gemma4_jax.tokenizer import Tokenizer
from tests.hf import checkpoints, samples

CONFIG = dataclasses.replace(sizes.tiny(), vision=None)
WEIGHTS = samples.lively_weights(CONFIG)
TOKENIZER = Tokenizer.load("bundled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text_only") / "in"
    state = nnx.state(samples.model(CONFIG, WEIGHTS))
    export_state(state, CONFIG, folder, tokenizer=TOKENIZER, max_soft_tokens=70)
    return folder


def named_in(folder: Path) -> dict[str, bytes]:
    file = TensorFile(folder / "model.safetensors")
    return {name: file.read(name).tobytes() for name in file.tensors}


def change_config(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in content.items() if name not in changes}
    given = {name: value for name, value in changes.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept | given))


def test_its_own_form(folder):
    content = json.loads((folder / "config.json").read_text())
    assert (content["architectures"], content["model_type"]) == (["Gemma4ForCausalLM"], "gemma4_text")
    assert "text_config" not in content
    assert named_in(folder).keys() == {name.replace("model.language_model.", "model.") for name in WEIGHTS}
    assert Checkpoint(folder).config == CONFIG


@pytest.mark.parametrize("has_tokens", [True, False])
def test_in_and_out_bit_for_bit(has_tokens, folder, tmp_path):
    """Whether config.json names the tokens of images, or only the tokenizer beside it, as in the reference's."""
    shutil.copytree(folder, tmp_path / "in")
    if not has_tokens:
        names = ("boi", "image", "eoi", "boa", "audio", "video")
        change_config(tmp_path / "in", eoa_token_index=None, **{f"{name}_token_id": None for name in names})
    model, processor = gemma4_jax.load_hf(tmp_path / "in")
    assert model.config == CONFIG
    gemma4_jax.save_hf(model, processor, tmp_path / "out")
    assert named_in(tmp_path / "out") == named_in(folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma4_text"


def test_a_decoder_in_the_form_of_a_whole_model_keeps_it(tmp_path):
    source = checkpoints.write_release(tmp_path / "in", CONFIG)
    gemma4_jax.save_hf(*gemma4_jax.load_hf(source), tmp_path / "out")
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(source)
    assert named_in(tmp_path / "out").keys() == named_in(source).keys()


def test_tokens_that_nothing_names(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    change_config(tmp_path / "in", image_token_id=None)
    (tmp_path / "in" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"put the model's tokenizer\.json beside it"):
        Checkpoint(tmp_path / "in")


def test_faults_are_told_in_its_own_names(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    change_config(tmp_path / "in", enable_moe_block=False)
    with pytest.raises(InputError, match=r"unexpected \(.*; model\.layers\.\{0-3\}\.experts"):
        Checkpoint(tmp_path / "in")


def test_the_reference_reads_it_and_writes_the_same(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert type(theirs).__name__ == "Gemma4ForCausalLM"
    assert not any(info.values()), info
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copy(folder / "tokenizer.json", tmp_path / "theirs")
    assert named_in(tmp_path / "theirs") == named_in(folder)
    model, processor = gemma4_jax.load_hf(tmp_path / "theirs")
    tokens = [2, 300, 400, 37, 600]
    given = np.asarray(model(processor(tokens=tokens)))[0, : len(tokens)]
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(given - expected).max() <= 1e-5 * np.abs(expected).max()  # as in tests/integration/test_export.py
