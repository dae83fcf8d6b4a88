import json
import shutil
from pathlib import Path

import pytest

from gemma4_jax.data.chat_templates import PLAIN
from gemma4_jax.errors import InputError
from gemma4_jax.fields import to_dict
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.run_dir import open_run_dir, run_tokenizer
from tests.train.tiny import typed


def open_tiny(config) -> Path:
    return open_run_dir(typed(config), run_tokenizer(typed(config)))


def test_keeps_the_config_and_what_it_ran_on(tiny_config):
    run_dir = open_tiny(tiny_config)
    assert json.loads((run_dir / "config.json").read_text()) == json.loads(json.dumps(to_dict(typed(tiny_config))))
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["packages"]["jax"]
    assert versions["command"]


def test_the_same_config_may_go_on(tiny_config):
    assert open_tiny(tiny_config) == open_tiny(tiny_config)


def test_a_different_config_is_refused_by_field(tiny_config):
    run_dir = open_tiny(tiny_config)
    before = (run_dir / "config.json").read_text()
    tiny_config.optimizer.learning_rate = 0.5
    tiny_config.model.text.mlp_dim = 48
    tiny_config.data.sources.python.weight = 0.5
    with pytest.raises(InputError) as error:
        open_tiny(tiny_config)
    for field in (
        "optimizer.learning_rate was 0.003 and is now 0.5",
        "model.text.mlp_dim",
        "data.sources.python.weight was 0.1",
    ):
        assert field in str(error.value)
    assert (run_dir / "config.json").read_text() == before


def test_fields_that_may_change(tiny_config):
    run_dir = open_tiny(tiny_config)
    tiny_config.train.num_steps += 5
    tiny_config.log.every_steps = 3
    tiny_config.mesh.fsdp = 2
    tiny_config.evaluators.eval.num_documents = 4
    tiny_config.data.sources.digits.path = "moved"
    with tiny_config.unlocked():
        tiny_config.data.sources.only_evaluated = {"kind": "jsonl", "path": "mine.jsonl", "weight": 0.0}
    tiny_config.data.allow_changes = True
    open_tiny(tiny_config)
    assert json.loads((run_dir / "config.json").read_text())["log"]["every_steps"] == 3


def test_a_run_of_an_earlier_version_is_named_as_one(tiny_config):
    run_dir = open_tiny(tiny_config)
    saved = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(saved | {"eval": saved.pop("evaluators")}))
    with pytest.raises(InputError, match=r"a run of an earlier version of this package.*init\.from_run="):
        open_tiny(tiny_config)


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_place_that_cannot_be_written_is_refused(tiny_config, tmp_path: Path, place: str):
    (tmp_path / "file").write_text("in the way")
    tiny_config.run_dir = str(tmp_path / place)
    with pytest.raises(InputError, match=r"run_dir=.* cannot be written to"):
        open_tiny(tiny_config)


def test_a_config_that_is_not_json_is_refused(tiny_config):
    run_dir = open_tiny(tiny_config)
    (run_dir / "config.json").write_text('{"name": ')
    with pytest.raises(InputError, match="not JSON"):
        open_tiny(tiny_config)


def release(folder: Path, template: str = "{{ messages }}") -> Path:
    """A folder with the bundled tokenizer, as a released model has it, and a chat template."""
    folder.mkdir()
    tokenizer = Tokenizer.load("bundled").path.read_text("utf-8")
    (folder / "tokenizer.json").write_text(tokenizer, "utf-8")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_run_goes_on_when_all_it_began_from_has_moved(tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    release(tmp_path / "model")
    tiny_config.tokenizer, tiny_config.init.from_hf = "model/tokenizer.json", "model"
    run_dir = open_tiny(tiny_config)
    assert (run_dir / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"

    tiny_config.tokenizer, tiny_config.init.from_hf = "./model", "./model"  # spelled in another way
    assert open_tiny(tiny_config) == run_dir
    (tmp_path / "model").rename(tmp_path / "moved")
    assert open_tiny(tiny_config) == run_dir
    tiny_config.tokenizer, tiny_config.init.from_hf = str(tmp_path / "moved"), str(tmp_path / "moved")
    assert open_tiny(tiny_config) == run_dir
    shutil.rmtree(tmp_path / "moved")
    assert run_tokenizer(typed(tiny_config)).path == run_dir / "tokenizer" / "tokenizer.json"
    monkeypatch.chdir("/")
    assert open_tiny(tiny_config) == run_dir


def test_another_tokenizer_is_refused_by_what_it_holds(tiny_config, tmp_path: Path):
    folder = release(tmp_path / "model")
    tiny_config.tokenizer = str(folder)
    open_tiny(tiny_config)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content | {"padding": None, "version": "1.0"}), "utf-8")
    with pytest.raises(InputError, match=r"tokenizer=.* is not the one with which run_dir=.* was begun"):
        open_tiny(tiny_config)


def test_another_model_to_begin_from_is_refused(tiny_config, tmp_path: Path):
    for name in ("one", "two"):
        release(tmp_path / name)
    tiny_config.init.from_hf = str(tmp_path / "one")
    open_tiny(tiny_config)
    tiny_config.init.from_hf = str(tmp_path / "two")
    with pytest.raises(InputError, match=r"init\.from_hf was .*one.* and is now .*two"):
        open_tiny(tiny_config)


def test_a_run_that_is_older_than_its_own_tokenizer_goes_on_and_gets_one(tiny_config, tmp_path: Path):
    tiny_config.tokenizer = str(release(tmp_path / "model"))
    run_dir = open_tiny(tiny_config)
    shutil.rmtree(run_dir / "tokenizer")
    tiny_config.tokenizer = "bundled"  # its content is the same, but nothing in the run tells
    with pytest.raises(InputError, match=r"tokenizer was .*model"):
        open_tiny(tiny_config)
    tiny_config.tokenizer = str(tmp_path / "model")
    open_tiny(tiny_config)
    assert (run_dir / "tokenizer" / "tokenizer.json").exists()


def test_the_home_of_the_user(tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_config.run_dir = "~/run"
    assert open_tiny(tiny_config) == tmp_path / "run"


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.mark.parametrize(("record", "carries"), [(CHAT, True), ({"text": "plain"}, False)])
def test_a_run_carries_the_plain_template_if_chats_are_written_by_it(tiny_config, tmp_path: Path, record, carries):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"broken": 1}) + "\n" + json.dumps(record))
    tiny_config.data.sources = {"mine": {"path": f"{tmp_path}/mine.jsonl"}}
    template = open_tiny(tiny_config) / "tokenizer" / "chat_template.jinja"
    assert template.is_file() == carries
    assert not carries or template.read_text("utf-8") == PLAIN.read_text("utf-8")


def test_a_run_with_a_template_carries_that(tiny_config, tmp_path: Path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(CHAT))
    tiny_config.data.sources = {"mine": {"path": f"{tmp_path}/mine.jsonl"}}
    tiny_config.tokenizer = str(release(tmp_path / "model"))
    assert (open_tiny(tiny_config) / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"
