"""What a good command line becomes."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
from absl import flags

from gemma4_jax.launch import checks, run_config
from gemma4_jax.sizes import SIZES


def test_overrides_reach_the_config_in_any_order():
    config = run_config.from_command_line(
        [
            "--config.train.num_steps=500",
            "--config=quickstart",
            "--config.optimizer.learning_rate",
            "1e-4",
            "--noconfig.log.tensorboard",
            "--config.export.at_end=false",
            "--config.data.mixture={'digits': 1, 'mine': 2.5}",
            "--config.data.sources={'mine': 'jsonl:train.jsonl'}",
            "--config.model.text.num_heads=8",
        ]
    )
    assert config.train.num_steps == 500
    assert config.optimizer.learning_rate == 1e-4
    assert config.log.tensorboard is False
    assert config.export.at_end is False
    assert config.data.mixture.to_dict() == {"digits": 1, "mine": 2.5}
    assert config.data.sources.mine == "jsonl:train.jsonl"
    assert run_config.model_config(config).text.num_heads == 8
    assert config.is_locked


def test_the_last_of_two_values_counts():
    config = run_config.from_command_line(["--config=base", "--config.seed=1", "--config.seed=2"])
    assert config.seed == 2


def test_flags_of_the_command_are_parsed_beside_the_config():
    command_flags = flags.FlagValues()
    flags.DEFINE_string("out", "preview.html", "", flag_values=command_flags)
    config = run_config.from_command_line(["--config=base", "--out", "page.html", "--config.seed=3"], command_flags)
    assert (command_flags["out"].value, config.seed) == ("page.html", 3)


def test_a_path_and_a_bare_name_are_the_same(tmp_path):
    copy = shutil.copy(run_config.shipped()["quickstart"], tmp_path)
    by_name = run_config.from_command_line(["--config=quickstart"])
    by_path = run_config.from_command_line([f"--config={copy}"])
    assert by_name.to_dict() == by_path.to_dict()


def test_a_config_takes_an_argument_behind_a_colon(tmp_path):
    config = run_config.from_command_line(["--config=base:small", "--config.seed=3"])
    assert (run_config.model_config(config), config.seed) == (SIZES["small"](), 3)
    path = tmp_path / "a:b" / "mine.py"
    path.parent.mkdir()
    path.write_text(
        "from gemma4_jax.configs import base\n\n\ndef get_config(words):\n    config = base.get_config()\n"
        "    config.name = words\n    return config\n"
    )
    assert run_config.from_command_line([f"--config={path}:x.py: y=1"]).name == "x.py: y=1"


@pytest.mark.parametrize("name", SIZES)
def test_architecture_survives_the_config(name):
    config = run_config.base.get_config(name)
    assert run_config.model_config(config) == SIZES[name]()


def test_vision_and_audio_may_be_switched_off(tmp_path):
    path = tmp_path / "text_only.py"
    path.write_text(
        "from gemma4_jax.configs import base\n\n\ndef get_config():\n    config = base.get_config('e2b')\n"
        "    config.model.vision = None\n    config.model.audio = None\n    config.data.images_per_row = 0\n"
        "    return config\n"
    )
    config = run_config.from_command_line([f"--config={path}"])
    expected = dataclasses.replace(SIZES["e2b"](), vision=None, audio=None)
    assert run_config.model_config(config) == expected


def test_every_number_and_word_outside_the_model_has_a_rule():
    fields = checks.leaves(run_config.base.get_config().to_dict())
    paths = ("model.", "mesh.", "data.mixture.", "data.sources", "eval.source")
    booleans = ("data.allow_changes", "log.tensorboard", "export.at_end", "checkpoint.checksums")
    assert {field for field in fields if not field.startswith((*paths, *booleans))} == set(checks.RANGES)


@pytest.mark.parametrize(
    ("mistake", "meant"),
    [
        ("train.num_step", "train.num_steps"),
        ("num_heads", "model.text.num_heads"),
        ("optimiser.lerning_rate", "optimizer.learning_rate"),
        ("data.batchsize", "data.batch_size"),
    ],
)
def test_nearest_field(mistake, meant):
    assert checks.nearest(mistake, checks.leaves(run_config.base.get_config().to_dict())) == meant


def test_a_mistake_is_found_before_anything_heavy_is_imported():
    program = (
        "import sys; from gemma4_jax.launch import cli; "
        "status = cli.main(['train', '--config=quickstart', '--config.train.num_step=5']); "
        "heavy = {'jax', 'numpy', 'grain', 'tokenizers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "nearest is train.num_steps" in finished.stderr
