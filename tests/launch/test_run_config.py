"""What a good command line becomes."""

import dataclasses
import shutil
import subprocess
import sys
from typing import get_type_hints

import pytest
from absl import flags

from gemma4_jax.config import Gemma4Config
from gemma4_jax.configs import base
from gemma4_jax.fields import leaf_names, nearest
from gemma4_jax.launch import command_line
from gemma4_jax.run_config import GroupConfig, RunConfig, SourceConfig
from gemma4_jax.sizes import SIZES
from tests.train.tiny import typed


def test_overrides_reach_the_config_in_any_order():
    config = command_line.from_command_line(
        [
            "--config.train.num_steps=500",
            "--config=quickstart",
            "--config.optimizer.learning_rate",
            "1e-4",
            "--noconfig.log.tensorboard",
            "--config.export.at_end=false",
            "--config.data.sources={'mine': {'path': 'train.jsonl', 'weight': 2}}",
            "--config.mesh.fsdp=2",
            "--config.model.text.num_heads=8",
        ]
    )
    assert config.train.num_steps == 500
    assert config.optimizer.learning_rate == 1e-4
    assert config.log.tensorboard is False
    assert config.export.at_end is False
    assert config.data.mixture == {"mine": SourceConfig("mine", kind="jsonl", path="train.jsonl", weight=2)}
    assert config.mesh.fsdp == 2
    assert config.model.text.num_heads == 8


def test_one_source_of_many_is_changed_by_its_name():
    config = command_line.from_command_line(["--config=base", "--config.data.sources.digits.weight=0.25"])
    assert {name: source.weight for name, source in config.data.sources.items()} == {"digits": 0.25, "python": 0.1}


def test_groups_of_parameters_on_the_command_line():
    frozen = "({'pattern': 'vision.*', 'learning_rate_scale': 0.0},)"
    config = command_line.from_command_line(["--config=base", f"--config.optimizer.groups={frozen}"])
    assert config.optimizer.groups == (GroupConfig(pattern="vision.*", learning_rate_scale=0.0),)


def test_the_last_of_two_values_counts():
    config = command_line.from_command_line(["--config=base", "--config.seed=1", "--config.seed=2"])
    assert config.seed == 2


def test_flags_of_the_command_are_parsed_beside_the_config():
    command_flags = flags.FlagValues()
    flags.DEFINE_string("out", "preview.html", "", flag_values=command_flags)
    config = command_line.from_command_line(["--config=base", "--out", "page.html", "--config.seed=3"], command_flags)
    assert (command_flags["out"].value, config.seed) == ("page.html", 3)


def test_a_path_and_a_bare_name_are_the_same(tmp_path):
    copy = shutil.copy(command_line.shipped()["quickstart"], tmp_path)
    by_name = command_line.from_command_line(["--config=quickstart"])
    by_path = command_line.from_command_line([f"--config={copy}"])
    assert by_name == by_path


def test_a_config_takes_an_argument_behind_a_colon(tmp_path):
    config = command_line.from_command_line(["--config=base:small", "--config.seed=3"])
    assert (config.model, config.seed) == (SIZES["small"](), 3)
    path = tmp_path / "a:b" / "mine.py"
    path.parent.mkdir()
    path.write_text(
        "from gemma4_jax.configs import base\n\n\ndef get_config(words):\n    config = base.get_config()\n"
        "    config.name = words\n    return config\n"
    )
    assert command_line.from_command_line([f"--config={path}:x.py: y=1"]).name == "x.py: y=1"


@pytest.mark.parametrize("name", SIZES)
def test_architecture_survives_the_config(name):
    assert typed(base.get_config(name)).model == SIZES[name]()


def test_vision_and_audio_may_be_switched_off(tmp_path):
    path = tmp_path / "text_only.py"
    path.write_text(
        "from gemma4_jax.configs import base\n\n\ndef get_config():\n    config = base.get_config('e2b')\n"
        "    config.model.vision = None\n    config.model.audio = None\n    config.data.images_per_row = 0\n"
        "    return config\n"
    )
    config = command_line.from_command_line([f"--config={path}"])
    expected = dataclasses.replace(SIZES["e2b"](), vision=None, audio=None)
    assert config.model == expected


def test_what_follows_from_other_fields_follows_them():
    config = command_line.from_command_line(
        ["--config=base", "--config.data.seq_len=300", "--config.data.images_per_row=3", "--config.data.batch_size=24"]
    )
    resolved = config.resolved()
    assert resolved.train.loss_chunk == 100  # the largest divisor of 300 that is no larger than 128
    assert config.resolved(context=3).train.loss_chunk == 75  # 25 positions of the 100 that each of three devices has
    assert resolved.data.patches_per_row == 3 * 70 * 2**2
    assert resolved.evaluators["eval"].batch_size == 24
    assert config.data.patches_per_row == 0


def test_every_field_says_what_it_means():
    """And every number and word has a rule, but for those of the mesh, which are checked where it is made."""
    free = ("model", "data.sources", "evaluators", "mesh", "optimizer.groups")
    for path, item in fields_below(RunConfig):
        assert item.metadata["meaning"].endswith((".", "NAME"))
        is_free = path.startswith(free) or item.type in (bool, "bool")
        assert is_free or item.metadata["rule"] is not None, path


def fields_below(kind, prefix=""):
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from fields_below(hint, f"{prefix}{item.name}.") if hint is not Gemma4Config else ()
        else:
            yield f"{prefix}{item.name}", item


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
    assert nearest(mistake, leaf_names(RunConfig)) == meant


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
