"""`gemma4 convert`, `gemma4 generate` and runs that begin from a checkpoint, through the command line."""

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import PIL.Image
import pytest

import gemma4_jax
from gemma4_jax.checkpoints.integrity import CHECKSUMS
from gemma4_jax.hf.names import tensors
from gemma4_jax.hf.save import CARRIED, export_run
from gemma4_jax.launch import cli, command_line
from tests.hf import checkpoints
from tests.train.tiny import typed

TINY = Path(__file__).parents[1] / "train" / "tiny.py"


@pytest.fixture(scope="module")
def config():
    return typed(command_line.load(TINY)).model


@pytest.fixture(scope="module")
def release(config, tmp_path_factory):
    """A checkpoint of the tiny model, with tensors that the model does not use."""
    return checkpoints.write_release(tmp_path_factory.mktemp("release") / "in", config)


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, *arguments) -> str:
    """The one sentence with which a command is refused."""
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert error.startswith("gemma4: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "deep" / "out"
    assert cli.main(["convert", str(release), str(out)]) == 0
    return out


def test_a_converted_checkpoint_comes_back_bit_for_bit(converted, release, tmp_path):
    assert (converted / CARRIED).exists()
    assert [path.name for path in converted.parent.iterdir()] == ["out"]
    export_run(converted, tmp_path / "again")
    assert checkpoints.stored(tmp_path / "again") == checkpoints.stored(release)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (release / name).read_bytes()


def test_convert_refuses(converted, release, tmp_path, capsys):
    assert "is there already" in refused(capsys, "convert", release, converted)
    assert "HF_DIR and OUT" in refused(capsys, "convert", release)
    assert "config.json cannot be read" in refused(capsys, "convert", tmp_path / "nowhere", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_convert_leaves_nothing_half_written(release, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma4_jax.hf.convert.save_streamed", stop)
    assert run(capsys, "convert", release, tmp_path / "out")[0] == 130
    assert not list(tmp_path.iterdir())


def overrides(run_dir: Path, tokenizer: Path, **fields) -> list[str]:
    given = {"train.num_steps": 1, "optimizer.warmup_steps": 0, "optimizer.learning_rate": 1e-30} | fields
    given |= {
        "run_dir": run_dir,
        "tokenizer": tokenizer,
        "optimizer.weight_decay": 0.0,
        "evaluators.eval.num_documents": 2,
    }
    return [f"--config={TINY}", *(f"--config.{name}={value}" for name, value in given.items())]


@pytest.mark.slow
def test_a_run_that_learns_nothing_exports_what_it_began_from(release, tmp_path, capsys):
    """A learning rate too small to change a float32: so what was trained are the parameters of the checkpoint."""
    arguments = overrides(tmp_path / "run", release / "tokenizer.json", **{"init.from_hf": release})
    status, _, error = run(capsys, "train", *arguments)
    assert status == 0, error
    assert checkpoints.stored(tmp_path / "run" / "export") == checkpoints.stored(release)


@pytest.mark.slow
def test_a_run_from_a_converted_checkpoint_trains_in_float32(config, tmp_path, capsys):
    """What is stored in bfloat16 is cast when a run begins, and what the run carries stays as it is."""
    release = checkpoints.write_release(tmp_path / "in", config, lambda _, array: array.astype(ml_dtypes.bfloat16))
    assert run(capsys, "convert", release, tmp_path / "converted")[0] == 0
    arguments = overrides(tmp_path / "run", release / "tokenizer.json", **{"init.from_run": tmp_path / "converted"})
    status, _, error = run(capsys, "train", *arguments)
    assert status == 0, error
    kinds = {name: kind for name, (kind, *_) in checkpoints.stored(tmp_path / "run" / "export").items()}
    redundant = {tensor.name for tensor in tensors(config) if tensor.is_redundant}
    assert redundant
    assert kinds == {name: "BF16" if name in redundant else "F32" for name in kinds}
    assert run(capsys, "export", tmp_path / "run", tmp_path / "out", "--dtype=bfloat16")[0] == 0
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(release)


def test_export_refuses(converted, tmp_path, capsys):
    assert "perhaps --dtype=DTYPE, and was given nothing" in refused(capsys, "export")
    assert "dtype='int8' is not possible" in refused(capsys, "export", converted, tmp_path / "out", "--dtype=int8")
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_model_is_refused_before_anything_is_written(config, converted, release, tmp_path, capsys):
    for source, path in (("from_hf", release), ("from_run", converted)):
        fields = {f"init.{source}": path, "model.text.mlp_dim": 48, "model.text.sliding_window": 32}
        error = refused(capsys, "train", *overrides(tmp_path / "run", release / "tokenizer.json", **fields))
        assert "is another model: " in error
        assert f"text.mlp_dim is {config.text.mlp_dim}, and 48 in the model" in error
        assert f"text.sliding_window is {config.text.sliding_window}, and 32 in the model" in error
    both = {"init.from_hf": release, "init.from_run": converted}
    assert "init.from_run=" in refused(capsys, "train", *overrides(tmp_path / "run", release, **both))
    nowhere = {"init.from_run": tmp_path / "nowhere"}
    assert "holds no checkpoint" in refused(capsys, "train", *overrides(tmp_path / "run", release, **nowhere))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_generate(release, picture, capsys):
    """What is printed is what the Python API gives: a chat by default, and a plain text with --raw."""
    model, processor = gemma4_jax.load_hf(release)
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    (expected,) = gemma4_jax.generate(
        model, processor, [{"role": "user", "content": parts}], images=[str(picture)], max_new_tokens=6
    )
    status, out, _ = run(capsys, "generate", release, "--prompt=What?", f"--image={picture}", "--max_new_tokens=6")
    assert (status, out) == (0, expected + "\n")

    options = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 3}
    (expected,) = gemma4_jax.generate(model, processor, "def <|image|>", images=[str(picture)], **options)
    flags = [f"--{name}={value}" for name, value in options.items()]
    status, out, _ = run(capsys, "generate", release, "--raw", "--prompt=def <|image|>", f"--image={picture}", *flags)
    assert (status, out) == (0, expected + "\n")


def test_generate_from_a_run_is_as_from_its_export(release, converted, capsys):
    """`converted` is the run directory that `release` became; both have a chat template."""
    answers = [
        run(capsys, "generate", folder, "--prompt=What?", "--max_new_tokens=6") for folder in (release, converted)
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "takes one MODEL"),
        (["a", "b", "--prompt=x"], "takes one MODEL, and was given a b"),
        (["nowhere", "--prompt=x"], "nowhere/config.json cannot be read"),
        (["nowhere"], "--prompt is needed"),
        (["nowhere", "--prompt=x", "--temprature=1"], "the nearest is --temperature"),
        (["nowhere", "--prompt=x", "--top_k=many"], "top_k"),
        (["nowhere", "--prompt=x", "--dtype=int8"], "dtype"),
    ],
)
def test_generate_refuses(arguments, reason, capsys):
    assert reason in refused(capsys, "generate", *arguments)


def test_generate_refuses_once_the_model_is_there(release, capsys):
    error = refused(capsys, "generate", release, "--prompt=x", "--image=/nowhere/x.png")
    assert "/nowhere/x.png cannot be read" in error
    assert "temperature=-1.0" in refused(capsys, "generate", release, "--prompt=x", "--temperature=-1")
    assert "top_k=5 does nothing at temperature=0" in refused(capsys, "generate", release, "--prompt=x", "--top_k=5")


def test_generate_says_where_an_image_stands_in_a_text(release, picture, tmp_path, capsys):
    for path in release.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).symlink_to(path)
    error = refused(capsys, "generate", tmp_path, "--prompt=x", f"--image={picture}")
    assert "0 places for images, and 1 are given: write <|image|> in a text" in error


@pytest.fixture
def damaged(converted, tmp_path) -> Path:
    """A run with an intact checkpoint of step 0 and one of step 1 in which a byte was flipped."""
    shutil.copytree(converted, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "0", folder / "1")
    file = max((folder / "1").glob("model/**/d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return tmp_path / "run"


def test_check(converted, damaged, capsys, tmp_path):
    status, out, _ = run(capsys, "check", converted)
    assert status == 0
    assert re.fullmatch(r"step 0: intact, \d+ files of \d+\.\d MB compared by their checksums\n", out)
    status, out, error = run(capsys, "check", damaged)
    assert status == 2
    assert re.search(r"step 0: intact.*\nstep 1: damaged, the bytes of model/.* are not those that were written\n", out)
    assert error == (
        f"gemma4: 1 of 2 checkpoints in {damaged} are damaged (step 1): a run goes on from the newest intact one.\n"
    )
    (damaged / "checkpoints" / "1" / CHECKSUMS).unlink()
    status, out, _ = run(capsys, "check", damaged)
    assert status == 0
    assert out.endswith("step 1: unknown, it was written without checksums\n")
    assert "holds no checkpoint" in refused(capsys, "check", tmp_path)
    assert "one folder" in refused(capsys, "check")


def test_an_export_is_of_the_newest_intact_checkpoint_and_says_so(release, damaged, capsys, tmp_path):
    status, _, error = run(capsys, "export", damaged, tmp_path / "out")
    assert status == 0
    assert re.fullmatch(r"gemma4: checkpoint .*/1 is damaged: .*; the checkpoint of step 0 is taken\.\n", error)
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(release)
    assert (damaged / "checkpoints" / "1").exists()


@pytest.mark.parametrize(
    "command",
    [
        "export RUN gs://b/out",
        "export gs://b/run OUT",
        "convert s3://b/in OUT",
        "convert RUN s3://b/out",
        "check gs://b/run",
        "generate gs://b/model --prompt=x",
        "generate RUN --prompt=x --image=gs://b/x.png",
        "preview --config=base --out=gs://b/x.html",
        "train --config=gs://b/x.py",
    ],
)
def test_an_address_is_refused(command, converted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command.replace("RUN", str(converted)).replace("OUT", "out").split()
    assert "must be a local path; mount a bucket" in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_the_home_of_the_user(converted, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(converted, tmp_path / "run")
    assert run(capsys, "export", "~/run", "~/out")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_help(capsys):
    for command in ("convert", "generate"):
        assert f"gemma4 {command} " in run(capsys, command, "--help")[1]


def test_what_convert_wrote_is_plain(converted):
    content = json.loads((converted / "config.json").read_text())
    assert content["data"] == {"soft_tokens_per_image": 70}
    assert content["tokenizer"] == "tokenizer/tokenizer.json"
