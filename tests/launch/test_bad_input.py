"""Whatever is wrong with what a command is given: one sentence on stderr, exit status 2, nothing half-done."""

import errno
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.launch import cli, command_line
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.lock import RunLock
from gemma4_jax.train.loop import _summary_of_finished
from gemma4_jax.train.run_dir import open_run_dir, run_tokenizer
from tests.train.tiny import typed

TINY = Path(__file__).parents[1] / "train" / "tiny.py"

MISTAKES = [
    # unknown names
    ("--config.train.num_step=5", "train.num_step=5", "nearest is train.num_steps"),
    ("--config.num_steps=5", "num_steps=5", "nearest is train.num_steps"),
    ("--config.model.text.numheads=4", "model.text.numheads=4", "nearest is model.text.num_heads"),
    ("--config.optimiser.learning_rate=1", "optimiser.learning_rate=1", "nearest is optimizer.learning_rate"),
    ("--config..=5", ".=5", "no such field"),
    ("--confg.seed=5", "--confg.seed=5", "nearest is --config"),
    ("--ouput=5", "--ouput=5", "no such flag"),
    ("stray", "'stray'", "--config.FIELD=VALUE"),
    # wrong types
    ("--config.train.num_steps=many", "train.num_steps='many'", "a whole number"),
    ("--config.train.num_steps=0.5", "train.num_steps='0.5'", "a whole number"),
    ("--config.optimizer.learning_rate=fast", "optimizer.learning_rate='fast'", "a finite number"),
    ("--config.optimizer.learning_rate=nan", "optimizer.learning_rate=nan", "a finite number"),
    ("--config.log.tensorboard=maybe", "log.tensorboard='maybe'", "true or false"),
    ("--config.data.sources=digits", "data.sources='digits'", "a dictionary"),
    ("--config.data.sources={'mine': 3}", "data.sources.mine=3", "a dictionary"),
    ("--config.data.sources={'mine': {'weight': 'all'}}", "data.sources.mine.weight='all'", "a finite number"),
    ("--config.data.sources={'mine': {'pth': 'a'}}", "data.sources.mine.pth='a'", "nearest is data.sources.mine.path"),
    ("--config.data.sources={'a': {}, 'b': {}, 'a': {}}", "data.sources names 'a' twice", "a name of its own"),
    ("--config.data.sources={'a': {'path': 'x', 'path': 'y'}}", "data.sources names 'path' twice", "of its own"),
    ("--config.data.sources.mine=a", "data.sources.mine=a", """--config.data.sources="{'mine': {...}}\""""),
    ("--config.data.sources={'mine': {'weight': 0}}", "data.sources={'mine': 0}", "at least one source"),
    ("--config.data.mixture={'digits': 1}", "data.mixture={'digits': 1}", "no such field"),
    ("--config.optimizer.groups=({'pattern': '('},)", "optimizer.groups='('", "unterminated"),
    ("--config.optimizer.groups=({'pattern': 'vison.*'},)", "'vison.*'", "such as vision."),
    ("--config.optimizer.groups=({'pattern': '.*', 'learning_rate_scale': 0},)", "freezes every parameter", "leave"),
    ("--config.data.max_left_out=1", "data.max_left_out=1.0", "less than 1"),
    ("--config.data.long_masked=split", "data.long_masked='split'", "one of drop, cut_context"),
    ("--config.model.tokens={'pad': 'x'}", "model.tokens.pad='x'", "a whole number"),
    ("--config.train.num_steps", "--config.train.num_steps", "Missing value"),
    ("--config.model.audio=1", "model.audio=1", "only a config file can set it"),
    # impossible values
    ("--config.train.num_steps=0", "train.num_steps=0", "at least 1"),
    ("--config.seed=-1", "seed=-1", "between 0 and 2**32 - 1"),
    ("--config.seed=4294967296", "seed=4294967296", "between 0 and 2**32 - 1"),
    ("--config.name=", "name=''", "not empty"),
    ("--config.optimizer.learning_rate=-0.1", "optimizer.learning_rate=-0.1", "greater than 0"),
    ("--config.optimizer.b2=1", "optimizer.b2=1.0", "less than 1"),
    ("--config.train.remat=half", "train.remat='half'", "one of none, dots, attention, full, offload"),
    ("--config.train.compute_dtype=float16", "train.compute_dtype='float16'", "bfloat16"),
    ("--config.data.soft_tokens_per_image=100", "data.soft_tokens_per_image=100", "70, 140, 280, 560, 1120"),
    ("--config.run_dir=gs://bucket/run", "run_dir='gs://bucket/run'", "a local path; mount a bucket"),
    ("--config.tokenizer=hf://model", "tokenizer='hf://model'", "a local path"),
    ("--config.init.from_hf=s3://bucket/model", "init.from_hf='s3://bucket/model'", "a local path"),
    ("--config.init.from_run=s3://bucket/run", "init.from_run='s3://bucket/run'", "a local path"),
    ("--config.export.dir=gs://bucket/out", "export.dir='gs://bucket/out'", "a local path"),
    # impossible combinations
    ("--config.model.text.num_kv_heads=3", "model.text.num_kv_heads=3", "a divisor of num_heads="),
    ("--config.model.text.num_layers=5", "model.text.num_layers=5", "whole periods"),
    ("--config.data.soft_tokens_per_image=560", "data.seq_len=512", "at least 564"),
    ("--config.data.seq_len=4096", "data.seq_len=4096", "model.text.max_positions=2048"),
    ("--config.data.patches_per_row=100", "data.patches_per_row=100", "at least 280"),
    ("--config.data.patches_per_row=1681", "data.patches_per_row=1681", "a multiple of 4"),
    ("--config.model.vision.num_positions=100", "model.vision.num_positions=100", "140 patches long"),
    ("--config.train.grad_accum_steps=3", "train.grad_accum_steps=3", "a divisor of data.batch_size"),
    ("--config.optimizer.warmup_steps=1000000", "optimizer.warmup_steps=1000000", "less than train.num_steps"),
    # the eight devices of these tests
    ("--config.mesh.data=3", "mesh (data=3", "8 devices"),
    ("--config.mesh.fsdp=3", "mesh (data=-1, fsdp=3", "8 devices"),
    ("--config.mesh.tensor=-1", "mesh has 2 axes of -1", "at most one"),
    ("--config.mesh.data=0", "mesh.data=0", "at least 1, or -1"),
    ("--config.data.batch_size=12", "data.batch_size=12", "a multiple of 8"),
    ("--config.train.grad_accum_steps=2", "data.batch_size=8", "a multiple of 16"),
]


@pytest.mark.parametrize(("override", "names", "says"), MISTAKES)
def test_override(override, names, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = cli.main(["train", "--config=base", override])
    assert_one_sentence(capsys.readouterr(), status, names, says)
    assert list(tmp_path.iterdir()) == []


def assert_one_sentence(captured, status, *parts):
    assert status == 2
    assert re.fullmatch(r"(.* \.\.\.\n|.* in [\d.]+ s\n)*", captured.out)  # what it had done by then, if anything
    message = captured.err
    assert message.startswith("gemma4: ")
    assert message.count("\n") == 1
    assert message.endswith(".\n")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train"], ["--config is needed", "quickstart"]),
        (["train", "--config"], ["--config is needed"]),
        (["train", "--config=quikstart"], ["--config=quikstart", "the nearest is quickstart"]),
        (["train", "--config=missing.py"], ["missing.py", "no such file"]),
        (["train", f"--config={'long' * 100}.py"], ["longlong", "name too long"]),
        (["preview", "--config=missing.py"], ["missing.py", "no such file"]),
        (["preview", "--config=base", "--uot=page.html"], ["--uot=page.html", "nearest is --out"]),
        (["trian"], ["'trian'", "train, fields, preview, prepare, export"]),
        (["export"], ["RUN_DIR and OUT_DIR", "nothing"]),
        (["export", "a", "b", "c"], ["RUN_DIR and OUT_DIR", "a b c"]),
        (["export", "--run=a", "b"], ["RUN_DIR and OUT_DIR", "--run=a b"]),
    ],
)
def test_command(arguments, parts, capsys):
    status = cli.main(arguments)
    assert_one_sentence(capsys.readouterr(), status, *parts)


FROM_BASE = "from gemma4_jax.configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def get_config(:\n", ["line 1", "SyntaxError"]),
        ("import nothing_of_this_name\n", ["line 1", "ModuleNotFoundError", "nothing_of_this_name"]),
        ("\n\ndef get_config():\n    return 1 / 0\n", ["line 4", "ZeroDivisionError"]),
        ("x = 3\n", ["must define a function get_config()"]),
        ("def get_config():\n    return {}\n", ["ConfigDict"]),
        (FROM_BASE + "    config.train.num_step = 5\n    return config\n", ["line 6", "num_step", "train.num_steps"]),
        (FROM_BASE + "    config.train.num_steps = 'x'\n    return config\n", ["line 6", "TypeError", "num_steps"]),
        (FROM_BASE + "    config.train.num_steps = -5\n    return config\n", ["train.num_steps=-5", "at least 1"]),
        (
            FROM_BASE + "    with config.unlocked():\n        config.train.stepz = 5\n    return config\n",
            ["train.stepz=5", "no such field"],
        ),
        (
            FROM_BASE + "    with config.unlocked():\n        del config.model\n    return config\n",
            ["model is missing"],
        ),
        (
            "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'steps': 5})\n",
            ["steps=5", "nearest is"],
        ),
        ("\x00\xff", ["SyntaxError"]),
    ],
)
def test_config_file(source, parts, capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(source, encoding="latin-1")
    status = cli.main(["train", f"--config={path}"])
    assert_one_sentence(capsys.readouterr(), status, *parts)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("base:smal", ["'smal' is not a size", "e2b", "small"]),
        ("quickstart:small", ["quickstart.py takes no argument", "leave out :small"]),
        ("{path}", ["needs an argument", "mine.py:ARGUMENT"]),
        ("quickstrat:small", ["neither a .py file nor a shipped config", "nearest is quickstart"]),
    ],
)
def test_the_argument_of_a_config(given, parts, capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(size):\n    return size\n")
    status = cli.main(["train", f"--config={given.format(path=path)}"])
    assert_one_sentence(capsys.readouterr(), status, *parts)


def test_a_folder_is_not_a_config(capsys, tmp_path):
    (tmp_path / "folder.py").mkdir()
    status = cli.main(["train", f"--config={tmp_path}/folder.py"])
    assert_one_sentence(capsys.readouterr(), status, "folder.py", "is a directory")


def train(run_dir: Path, *overrides: str) -> int:
    return cli.main(["train", f"--config={TINY}", f"--config.run_dir={run_dir}", *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_run_directory_that_cannot_be_written(place, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    status = train(tmp_path / place)
    assert_one_sentence(
        capsys.readouterr(), status, f"run_dir='{tmp_path / place}'", "cannot be written to", "give a folder"
    )
    assert contents(tmp_path) == {"file": b"in the way"}


def test_a_run_directory_of_a_different_config(capsys, tmp_path):
    config = command_line.load(TINY)
    config.run_dir = str(tmp_path / "run")
    open_run_dir(typed(config), run_tokenizer(typed(config)))
    before = contents(tmp_path)
    status = train(tmp_path / "run", "--config.optimizer.learning_rate=0.5", "--config.data.seed=1")
    differing = "data.seed was 0 and is now 1; optimizer.learning_rate was 0.003 and is now 0.5"
    assert_one_sentence(capsys.readouterr(), status, f"({differing})", "another run_dir, or the same config")
    assert contents(tmp_path) == before


def test_a_run_directory_that_is_in_use(capsys, tmp_path):
    run_dir = tmp_path / "run"
    with RunLock(run_dir, print):
        (run_dir / "metrics.jsonl").write_text("half a li")
        before = contents(run_dir)
        status = train(run_dir, "--config.evaluators.eval.num_documents=2")
        names = (f"run_dir='{run_dir}' is in use by process {os.getpid()} on ", " since 20", "give another run_dir")
        assert_one_sentence(capsys.readouterr(), status, *names)
        assert contents(run_dir) == before


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3"])
def test_a_config_in_a_run_directory_that_is_none(content, tmp_path):
    config = command_line.load(TINY)
    config.run_dir = str(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"holds a config.json that is not [^:]*(\(.*\))?: give another run_dir"):
        open_run_dir(typed(config), Tokenizer.load("bundled"))


def test_a_summary_in_a_run_directory_that_is_none(tmp_path):
    for content in (b"{", b"[]", b"3", b"{}", b"\xff", b"[" * 100_000):
        (tmp_path / "summary.json").write_bytes(content)
        with pytest.raises(InputError, match=r"summary.json cannot be read as the summary of a run: remove it"):
            _summary_of_finished(tmp_path, 5, 5)


def of_lines(path: Path, *records: dict) -> list[str]:
    """Overrides that train on these records, written to a file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [f"--config.data.sources={{'mine': {{'path': '{path}'}}}}"]


def test_a_row_that_does_not_spread_evenly(capsys, tmp_path):
    mesh = "--config.mesh={'data':1,'fsdp':1,'expert':1,'context':8,'tensor':1}"
    status = train(tmp_path / "run", mesh, "--config.data.seq_len=184")
    assert_one_sentence(capsys.readouterr(), status, "data.seq_len=184", "a multiple of 16, two chunks for each shard")
    status = train(tmp_path / "run", mesh, "--config.train.loss_chunk=7")
    assert_one_sentence(capsys.readouterr(), status, "train.loss_chunk=7", "a position or more for each shard")


def test_attention_that_no_layer_can_use(capsys, tmp_path):
    status = train(tmp_path / "run", "--config.train.attention=interval")
    assert_one_sentence(
        capsys.readouterr(), status, "attention='interval'", "written for TPUs", "must be auto, blockwise or"
    )


def test_a_run_that_cannot_begin_claims_no_run_directory(capsys, tmp_path):
    """So that the next command, with the mistake mended, is not that of a different config."""
    mistakes = [
        "--config.data.sources={'mine': {'path': 'nowhere.jsonl'}}",
        "--config.tokenizer=nowhere.json",
        "--config.evaluators.eval.source=nowhere",
        "--config.mesh={'data':1,'fsdp':1,'expert':1,'context':1,'tensor':8}",
    ]
    for mistake, part in zip(mistakes, ("nowhere.jsonl", "nowhere.json", "'nowhere'", "mesh.tensor=8"), strict=True):
        status = train(tmp_path / "run", mistake)
        assert_one_sentence(capsys.readouterr(), status, part)
        assert not (tmp_path / "run").exists()


def test_an_empty_data_set(capsys, tmp_path):
    status = train(tmp_path / "run", *of_lines(tmp_path / "empty.jsonl"))
    assert_one_sentence(capsys.readouterr(), status, "'mine'", "has no documents")


def test_a_data_set_that_is_not_there(capsys, tmp_path):
    overrides = of_lines(tmp_path / "mine.jsonl")
    (tmp_path / "mine.jsonl").unlink()
    status = train(tmp_path / "run", *overrides)
    assert_one_sentence(capsys.readouterr(), status, "mine.jsonl", "cannot be read", "No such file")


def write_images(folder: Path) -> None:
    """good.png, and broken.png, of which the end is missing."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(file, "PNG")
    (folder / "good.png").write_bytes(file.getvalue())
    (folder / "broken.png").write_bytes(file.getvalue()[:-4000])


def test_a_data_set_of_which_nothing_can_be_read(capsys, tmp_path):
    write_images(tmp_path)
    status = train(tmp_path / "run", *of_lines(tmp_path / "mine.jsonl", {"segments": [{"image": "broken.png"}]}))
    assert_one_sentence(
        capsys.readouterr(),
        status,
        "documents read of 'mine' were left out",
        "mine.jsonl line 1: broken.png: ",
        "cannot be decoded",
        "PNG",
    )
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_bad_documents_are_left_out_counted_and_reported(caplog, capsys, tmp_path):
    """A corrupt image, more images than a row has room for, and a text longer than a row; the rest is trained on."""
    write_images(tmp_path)
    good, broken = ({"image": f"{name}.png"} for name in ("good", "broken"))
    answer = {"text": "an answer"}
    records = [{"segments": [*images, answer]} for images in ([good], [broken], [good, good, good], [good])]
    overrides = of_lines(tmp_path / "mine.jsonl", *records, {"text": "x = 1\n" * 100})
    one_period = ["--config.model.text.num_layers=2", "--config.model.text.num_kv_shared_layers=0"]
    short = ["--config.train.num_steps=3", "--config.export.at_end=false"]
    assert train(tmp_path / "run", *overrides, *one_period, *short) == 0
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    counts = counts["mine"]
    assert min(counts[name] for name in ("documents", "images", "split", "dropped", "unreadable")) > 0
    assert "documents read of 'mine' were left out (" in capsys.readouterr().out
    assert "mine.jsonl line 2: broken.png: an image cannot be decoded" in caplog.text
    assert "mine.jsonl line 3: " in caplog.text
    assert "data.images_per_row=2" in caplog.text


def test_an_export_of_what_is_no_run(capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    for run_dir in ("nowhere", "folder"):
        status = cli.main(["export", str(tmp_path / run_dir), str(tmp_path / "out")])
        assert_one_sentence(capsys.readouterr(), status, f"{tmp_path / run_dir} is not a run directory")
        assert not (tmp_path / "out").exists()


def test_an_export_of_a_run_without_a_checkpoint(capsys, tmp_path):
    config = command_line.load(TINY)
    config.run_dir = str(tmp_path / "run")
    open_run_dir(typed(config), run_tokenizer(typed(config)))
    status = cli.main(["export", config.run_dir, str(tmp_path / "out")])
    assert_one_sentence(capsys.readouterr(), status, f"{tmp_path / 'run'} holds no checkpoint: train it first")
    assert not (tmp_path / "out").exists()


def test_a_full_disk(capsys, monkeypatch):
    def write(_):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/mine/metrics.jsonl")

    monkeypatch.setattr("gemma4_jax.launch.export.main", write)
    status = cli.main(["export", "run", "out"])
    assert_one_sentence(capsys.readouterr(), status, "/runs/mine/metrics.jsonl cannot be written: the disk is full")
