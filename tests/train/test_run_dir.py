import json
from pathlib import Path

import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.train.run_dir import open_run_dir


def test_keeps_the_config_and_what_it_ran_on(tiny_config):
    run_dir = open_run_dir(tiny_config)
    assert json.loads((run_dir / "config.json").read_text()) == json.loads(json.dumps(tiny_config.to_dict()))
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["packages"]["jax"]
    assert versions["command"]


def test_the_same_config_may_go_on(tiny_config):
    assert open_run_dir(tiny_config) == open_run_dir(tiny_config)


def test_a_different_config_is_refused_by_field(tiny_config):
    run_dir = open_run_dir(tiny_config)
    before = (run_dir / "config.json").read_text()
    tiny_config.optimizer.learning_rate = 0.5
    tiny_config.model.text.mlp_dim = 48
    tiny_config.data.mixture = {"digits": 1.0}
    with pytest.raises(InputError) as error:
        open_run_dir(tiny_config)
    for field in ("optimizer.learning_rate was 0.003 and is now 0.5", "model.text.mlp_dim", "data.mixture.python"):
        assert field in str(error.value)
    assert (run_dir / "config.json").read_text() == before


def test_fields_that_may_change(tiny_config):
    run_dir = open_run_dir(tiny_config)
    tiny_config.train.num_steps += 5
    tiny_config.log.every_steps = 3
    tiny_config.mesh.fsdp = 2
    tiny_config.eval.num_documents = 4
    open_run_dir(tiny_config)
    assert json.loads((run_dir / "config.json").read_text())["log"]["every_steps"] == 3


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_place_that_cannot_be_written_is_refused(tiny_config, tmp_path: Path, place: str):
    (tmp_path / "file").write_text("in the way")
    tiny_config.run_dir = str(tmp_path / place)
    with pytest.raises(InputError, match=r"run_dir=.* cannot be written to"):
        open_run_dir(tiny_config)


def test_a_config_that_is_not_json_is_refused(tiny_config):
    run_dir = open_run_dir(tiny_config)
    (run_dir / "config.json").write_text('{"name": ')
    with pytest.raises(InputError, match="not JSON"):
        open_run_dir(tiny_config)
