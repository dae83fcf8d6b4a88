import json

import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.train.fingerprints import check_data
from gemma4_jax.train.loop import train
from tests.train.tiny import typed

BEFORE = {"mine": {"kind": "jsonl", "documents": 20, "bytes": 400}, "digits": {"kind": "digits", "version": 1}}
CHANGED = BEFORE | {"mine": {"kind": "jsonl", "documents": 21, "bytes": 420}}


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path):
    assert check_data(tmp_path, BEFORE, is_resumed=False, allow_changes=False) == []
    assert check_data(tmp_path, BEFORE, is_resumed=True, allow_changes=False) == []


def test_changed_data_is_named_and_refused_unless_the_run_allows_it(tmp_path):
    check_data(tmp_path, BEFORE, is_resumed=False, allow_changes=False)
    named = "of source 'mine' bytes was 400 and is 420, documents was 20 and is 21"
    for _ in range(2):  # refusing writes nothing
        with pytest.raises(InputError, match=rf"{named}; restore it.*data\.allow_changes=true"):
            check_data(tmp_path, CHANGED, is_resumed=True, allow_changes=False)
    assert check_data(tmp_path, CHANGED, is_resumed=True, allow_changes=True) == [named]
    assert check_data(tmp_path, CHANGED, is_resumed=True, allow_changes=False) == []


def test_a_run_without_a_step_may_have_other_data(tmp_path):
    check_data(tmp_path, BEFORE, is_resumed=False, allow_changes=False)
    check_data(tmp_path, CHANGED, is_resumed=False, allow_changes=False)
    assert check_data(tmp_path, CHANGED, is_resumed=True, allow_changes=False) == []


@pytest.mark.parametrize("content", ["", "[]", '{"mine": 3}'])
def test_a_damaged_record_of_the_data_is_refused(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(InputError, match=r"data\.json, .*cannot be read"):
        check_data(tmp_path, BEFORE, is_resumed=True, allow_changes=False)


@pytest.mark.slow
def test_a_run_knows_its_data_wherever_it_lies(shallow_config, tmp_path, monkeypatch, capsys):
    config = shallow_config
    lines = [json.dumps({"text": f"document {i}\n"}) for i in range(50)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    config.data.sources = {"mine": {"path": f"{tmp_path}/mine.jsonl"}}
    config.data.images_per_row = 0
    config.train.num_steps, config.optimizer.warmup_steps = 1, 0
    train(typed(config))

    (tmp_path / "moved").mkdir()
    (tmp_path / "mine.jsonl").rename(tmp_path / "moved" / "mine.jsonl")
    monkeypatch.chdir(tmp_path / "moved")
    config.data.sources, config.train.num_steps = {"mine": {"path": "./mine.jsonl"}}, 2
    assert train(typed(config))["steps"] == 2

    (tmp_path / "moved" / "mine.jsonl").write_text("\n".join([*lines, "not json"]))
    config.train.num_steps = 3
    with pytest.raises(InputError, match=r"of source 'mine' .*documents was 50 and is 51.*data\.allow_changes=true"):
        train(typed(config))
    config.data.allow_changes = True
    assert train(typed(config))["steps"] == 3
    assert "goes on although the data has changed: of source 'mine'" in capsys.readouterr().out
