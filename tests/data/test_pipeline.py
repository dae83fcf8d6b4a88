import dataclasses
import itertools
import json
import re

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest

from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.iterator import join_states, read_counters
from gemma4_jax.data.mixture import ROUND, Turns, mix_sources, open_sources
from gemma4_jax.data.pipeline import held_out_rows, held_out_source, make_train_iterator
from gemma4_jax.data.sources.digits import DigitsSource
from gemma4_jax.data.tally import MAX_NAMED
from gemma4_jax.errors import InputError
from gemma4_jax.sizes import e2b


@pytest.fixture
def make_iterator(make_config, tokenizer):
    iterators = []

    def make(config=None, **process):
        iterators.append(make_train_iterator(config or make_config(), tokenizer, **process))
        return iterators[-1]

    yield make
    for iterator in iterators:
        iterator.close()


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"mine": {"path": str(path)}}


def first_texts(iterator, tokenizer, num_batches):
    """The texts of the documents of some batches, without <bos> and <eos>."""
    texts = []
    for _ in range(num_batches):
        batch = next(iterator)
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            for segment in range(1, segments.max() + 1):
                texts.append(tokenizer.decode(tokens[segments == segment][1:-1].tolist()))
    return texts


def test_batches_have_the_shapes_of_the_config(make_iterator):
    batch = next(make_iterator())
    shapes = {name: leaf.shape for name, leaf in vars(batch).items()}
    text = ["tokens", "targets", "loss_weights", "positions", "segment_ids", "image_ids", "image_slots", "audio_slots"]
    assert shapes == dict.fromkeys(text, (4, 352)) | {
        "audio_features": (4, 0, 0),
        "frame_sound_ids": (4, 0),
        "patches": (4, 1120, 48),
        "patch_positions": (4, 1120, 2),
        "patch_image_ids": (4, 1120),
    }
    assert batch.patches.dtype == np.uint8
    assert batch.loss_weights.dtype == np.float32


def test_equal_configs_give_equal_batches_and_other_seeds_others(make_iterator, make_config):
    first, second, other = make_iterator(), make_iterator(), make_iterator(make_config(seed=1))
    assert_equal(next(first), next(second))
    assert_equal(next(first), next(second))
    assert not np.array_equal(next(first).tokens, next(other).tokens)


def test_it_goes_on_after_any_batch_exactly(make_iterator):
    whole = make_iterator()
    states, batches = [whole.get_state()], []
    for _ in range(6):
        batches.append(next(whole))
        states.append(json.loads(json.dumps(whole.get_state())))
    for start in range(6):
        resumed = make_iterator()
        next(resumed)  # an iterator that has already moved is set back just the same
        resumed.set_state(states[start])
        for batch in batches[start:]:
            assert_equal(next(resumed), batch)
        assert resumed.get_state() == states[-1]


def test_orbax_saves_and_restores_it(make_iterator, tmp_path):
    iterator = make_iterator()
    next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        expected = [next(iterator) for _ in range(2)]
        resumed = make_iterator()
        manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    for batch in expected:
        assert_equal(next(resumed), batch)


def test_processes_share_the_documents_out(make_iterator, make_config, tokenizer, tmp_path):
    texts = [f"document {i}" for i in range(768)]
    config = make_config(sources=write_jsonl(tmp_path / "mine.jsonl", texts), seq_len=80)
    halves = []
    for process in range(2):
        iterator = make_iterator(config, process_index=process, process_count=2)
        halves.append(first_texts(iterator, tokenizer, 32))
        assert next(iterator).tokens.shape == (2, 80)
    # An epoch is 384 documents in each process; its end is not sharp, because the packer chooses among some ahead.
    assert min(map(len, halves)) > 520
    assert set(halves[0][:80]).isdisjoint(halves[1][:80])
    assert {text for half in halves for text in half} == set(texts)


def test_every_document_comes_once_in_an_epoch(make_config, tokenizer, model, tmp_path):
    texts = [f"document {i}" for i in range(100)]
    config = make_config(sources=write_jsonl(tmp_path / "mine.jsonl", texts))
    encode = Encoder(tokenizer, model.vision, 70)
    mixed = mix_sources(config.data, open_sources(config.data), encode)
    epochs = [[mixed[i].text.name for i in range(start, start + 100)] for start in range(0, 1000, 100)]
    assert all(len(set(epoch)) == 100 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 10
    data = dataclasses.replace(config.data, seed=1)
    other = mix_sources(data, open_sources(data), encode)
    assert [other[i].text.name for i in range(100)] not in epochs


def test_turns_keep_the_proportions_in_every_shard_and_read_each_source_in_order():
    turns = Turns([0.7, 0.2, 0.1, 1e-9], [None] * 4, seed=0)
    taken = [turns[i] for i in range(2 * ROUND)]
    for process in range(2):
        shard = [source for source, _ in taken[process::2]]
        for start in range(0, ROUND, 1000):
            shares = np.bincount(shard[start : start + 1000], minlength=4) / 1000
            np.testing.assert_allclose(shares, [0.7, 0.2, 0.1, 0], atol=0.06)
    for source in range(4):
        indices = [index for chosen, index in taken if chosen == source]
        assert indices == list(range(len(indices)))
        assert indices


def test_a_source_drops_out_after_its_epochs_and_the_others_go_on_in_proportion(
    make_config, tokenizer, model, tmp_path
):
    few = write_jsonl(tmp_path / "few.jsonl", [f"few {i}" for i in range(10)])["mine"]
    rest = write_jsonl(tmp_path / "rest.jsonl", [f"rest {i}" for i in range(100)])["mine"]
    sources = {"few": few | {"epochs": 3}, "rest": rest, "more": rest | {"weight": 3}}
    data = make_config(sources=sources).data
    mixed = mix_sources(data, open_sources(data), Encoder(tokenizer, model.vision, 70))
    names = [mixed[i].text.source if mixed[i] is not None else None for i in range(2 * ROUND)]
    assert names.count("few") == 30
    assert names[-1000:].count("few") == 0
    assert names.count("more") == 3 * names.count("rest")


def test_the_data_ends_with_the_last_document_of_a_source_that_stops(make_config, tokenizer, model, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", [f"few {i}" for i in range(10)])["mine"]
    rest = write_jsonl(tmp_path / "rest.jsonl", [f"rest {i}" for i in range(100)])["mine"]
    sources = {"few": few | {"weight": 0.1, "epochs": 15, "at_end": "stop"}, "rest": rest}
    data = make_config(sources=sources).data
    mixed = mix_sources(data, open_sources(data), Encoder(tokenizer, model.vision, 70))
    names = [mixed[i].text.source for i in range(len(mixed))]
    assert names.count("few") == 150
    assert names[-1] == "few"
    assert names.count("rest") == pytest.approx(1500, rel=0.2)
    # Of two that stop, the first to be at its end ends all.
    assert len(Turns([3, 1], [30, 1000], 0, [0, 1])) == len(Turns([3, 1], [30, 1000], 0, [0])) < 100


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({"epochs": 3}, r"^data\.sources\.\*\.epochs={'few': 3} is not possible.* 0 for one .*, or at_end='stop'"),
        (
            {"at_end": "stop"},
            r"^data\.sources\.few\.epochs=0 is not possible: it must be at least 1 with at_end='stop'",
        ),
        ({"epochs": 3, "at_end": "repeat"}, r"^data\.sources\.few\.at_end='repeat' .* one of drop, stop"),
    ],
)
def test_data_that_cannot_end_so(source, match, make_config):
    with pytest.raises(InputError, match=match):
        make_config(sources={"few": {"path": "few.jsonl"} | source})


def test_what_is_read_when_the_data_ends_is_trained_on_whoever_reads_it(
    make_iterator, make_config, tokenizer, tmp_path
):
    """The last batches have empty rows; then all are empty. So it is with every process, worker and restart."""
    texts = [f"document {i}" + " and more" * (i % 8) for i in range(100)]
    source = write_jsonl(tmp_path / "mine.jsonl", texts)["mine"] | {"epochs": 2, "at_end": "stop"}
    config = make_config(sources={"mine": source}, seq_len=80)
    batches = list(itertools.islice(make_iterator(config), 60))
    num_full = sum(bool(batch.segment_ids.any()) for batch in batches)
    assert [bool(batch.segment_ids.any()) for batch in batches] == [True] * num_full + [False] * (60 - num_full)
    assert not all(batch.segment_ids.any(axis=1).all() for batch in batches[:num_full])
    read = first_texts(iter(batches), tokenizer, 60)
    assert sorted(read) == sorted(2 * texts)

    workers = make_config(sources={"mine": source}, seq_len=80, num_workers=2)
    halves = [make_iterator(workers, process_index=i, process_count=2) for i in range(2)]
    for batch in batches[: num_full // 2]:
        parts = [next(half) for half in halves]
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), batch.tokens)
    resumed = make_iterator(config)
    resumed.set_state(join_states([half.get_state() for half in halves]))
    for batch in batches[num_full // 2 : num_full + 2]:
        assert_equal(next(resumed), batch)


def test_training_never_sees_what_is_held_out(make_config, tokenizer, model):
    data = make_config(sources={"python": {"kind": "python"}}).data
    mixed = mix_sources(data, open_sources(data), Encoder(tokenizer, model.vision, 70))
    source = open_documents(data.sources["python"], split="held_out")
    held_out = {source[i].name.split(" part ")[0] for i in range(len(source))}
    assert held_out
    assert held_out.isdisjoint(mixed[i].text.name.split(" part ")[0] for i in range(5000))


def test_long_text_is_split_and_counted_across_a_resume(make_iterator, make_config, tokenizer, tmp_path):
    texts = ["x = 1\n" * 100, "short\n"]
    config = make_config(sources=write_jsonl(tmp_path / "mine.jsonl", texts), seq_len=100)
    iterator = make_iterator(config)
    for _ in range(5):
        next(iterator)
    counters = read_counters(iterator)["mine"]
    assert counters["split"] > 0
    assert counters["images"] == counters["dropped"] == counters["unreadable"] == 0
    resumed = make_iterator(config)
    resumed.set_state(iterator.get_state())
    assert read_counters(resumed) == {"mine": counters}


def test_unreadable_records_are_skipped_counted_and_named(make_iterator, make_config, tokenizer, tmp_path, caplog):
    path = tmp_path / "mine.jsonl"
    good, missing = '{"text": "good"}\n', '{"segments": [{"image": "missing.png"}]}\n'
    path.write_text((good + good + missing) * 50)
    iterator = make_iterator(make_config(sources={"mine": {"path": str(path)}}, seq_len=80))
    assert set(first_texts(iterator, tokenizer, 2)) == {"good"}
    assert read_counters(iterator)["mine"]["unreadable"] > 0
    assert re.search(r"mine\.jsonl line \d+: the image 'missing\.png' is missing", caplog.text)
    assert len(caplog.records) <= MAX_NAMED


def test_data_without_a_readable_record_is_an_error(make_iterator, make_config, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("not json\n")
    with pytest.raises(InputError, match=r"mine\.jsonl line 1"):
        next(make_iterator(make_config(sources={"mine": {"path": str(path)}})))


BAD_STATES = [[], None, {}, {"parent": {}, "waiting": [], "counters": {}}, {"format": 3, "num_workers": 0}]


@pytest.mark.parametrize("state", BAD_STATES, ids=str)
def test_what_is_no_place_in_the_data_is_refused(make_iterator, state):
    with pytest.raises(InputError, match=r"^The place in the data is damaged.*init\.from_run.*\.$"):
        make_iterator().set_state(state)


def test_a_place_of_another_batch_size_is_refused(make_iterator):
    iterator = make_iterator()
    with pytest.raises(InputError, match=r"^data\.batch_size=4 is not possible: this run was saved with 8, "):
        iterator.set_state(iterator.get_state() | {"num_shards": 8})


def test_a_damaged_place_is_refused(make_iterator):
    iterator = make_iterator()
    state = json.loads(json.dumps(iterator.get_state()).replace('"waiting": ""', '"waiting": "3"'))
    with pytest.raises(InputError, match="The place in the data is damaged"):
        iterator.set_state(state)


def test_a_missing_image_of_a_waiting_document_is_named_at_resume(make_iterator, make_config, tmp_path):
    for i in range(40):
        PIL.Image.new("RGB", (60, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    path = tmp_path / "mine.jsonl"
    lines = [{"segments": [{"image": f"{i}.png"}, {"text": "red\n"}]} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(sources={"mine": {"path": str(path)}}, batch_size=1)
    iterator = make_iterator(config)
    next(iterator)
    state = iterator.get_state()
    for i in range(0, 40, 4):
        (tmp_path / f"{i}.png").unlink()
    named = r"'mine'.*mine\.jsonl line \d+: the image '\d+\.png' is missing.*allow_changes=true"
    resumed = make_iterator(config)
    resumed.set_state(state)
    with pytest.raises(InputError, match=named):
        list(itertools.islice(resumed, 40))
    resumed = make_iterator(dataclasses.replace(config, data=dataclasses.replace(config.data, allow_changes=True)))
    resumed.set_state(state)
    for _ in range(40):
        next(resumed)
    assert read_counters(resumed)["mine"]["unreadable"] > 0


def test_rows_that_do_not_divide_among_processes_are_refused(make_iterator, make_config):
    with pytest.raises(InputError, match=r"batch_size=3 is not possible.* a multiple of the 2 processes"):
        make_iterator(make_config(batch_size=3), process_count=2)


def test_a_tokenizer_of_another_model_is_refused(make_config, tokenizer):
    with pytest.raises(InputError, match="does not belong to the model"):
        make_train_iterator(dataclasses.replace(make_config(), model=e2b()), tokenizer)


def test_a_vocabulary_that_does_not_fit_is_refused(make_config, model, tokenizer):
    small = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=512))
    with pytest.raises(InputError, match=r"vocab_size=512 is too small.*1024 tokens"):
        make_train_iterator(dataclasses.replace(make_config(), model=small), tokenizer)


def test_worker_processes_give_every_document_and_resume(make_iterator, make_config):
    config = make_config(num_workers=2)
    whole = make_iterator(config)
    batches = [next(whole) for _ in range(2)]
    state = whole.get_state()
    batches = [next(whole) for _ in range(3)]
    assert read_counters(whole)["digits"]["documents"] > 0
    resumed = make_iterator(config)
    resumed.set_state(state)
    for batch in batches:
        assert_equal(next(resumed), batch)


def texts_of(rows, tokenizer):
    return [tokenizer.decode(example.tokens.tolist()) for row in rows for example in row]


def test_held_out_rows_hold_the_first_documents_held_back(make_config, tokenizer):
    rows = held_out_rows(make_config(seed=5), tokenizer, "digits", 30)
    source = DigitsSource("held_out", seed=0)  # whatever the seed of training
    answers = [source[i]["segments"][2]["text"] for i in range(30)]
    given = {example.name: example for row in rows for example in row}
    assert given.keys() == {f"digits {i}" for i in range(30)}
    for i, answer in enumerate(answers):
        example = given[f"digits {i}"]
        assert tokenizer.decode(example.tokens[example.carries_loss].tolist()) == answer + "<eos>"


def test_the_source_to_evaluate_on_is_the_first_that_holds_documents_back(make_config):
    mine, digits, python = {"path": "x.jsonl"}, {"kind": "digits"}, {"kind": "python"}
    for sources, expected in [
        ({"python": python, "mine": mine, "digits": digits}, "digits"),
        ({"mine": mine, "python": python, "digits": digits | {"weight": 0}}, "python"),
        ({"mine": mine}, None),
        ({"python": python, "mine": mine | {"held_out": 0.1}}, "mine"),
    ]:
        assert held_out_source(make_config(sources=sources).data) == expected


def test_a_source_of_weight_0_is_read_whole(make_config, tokenizer, tmp_path):
    (source,) = write_jsonl(tmp_path / "rest.jsonl", [f"document {i}" for i in range(20)]).values()
    config = make_config(sources={"digits": {"kind": "digits"}, "rest": source | {"weight": 0}})
    rows = held_out_rows(config, tokenizer, "rest", 1000)
    assert set(texts_of(rows, tokenizer)) == {f"<bos>document {i}<eos>" for i in range(20)}
    with pytest.raises(InputError, match=r"data\.sources\.mine holds no documents back: give it a share in .*held_out"):
        held_out_rows(make_config(sources={"mine": source}), tokenizer, "mine", 10)


def test_a_share_held_out_is_never_trained_on(make_iterator, make_config, tokenizer, tmp_path):
    sources = write_jsonl(tmp_path / "mine.jsonl", [f"document {i}" for i in range(60)])
    sources["mine"]["held_out"] = 0.3
    config = make_config(sources=sources)
    held_out = {text[5:-5] for text in texts_of(held_out_rows(config, tokenizer, "mine", 1000), tokenizer)}
    trained = set(first_texts(make_iterator(config), tokenizer, 12))
    assert len(held_out) > 5
    assert held_out.isdisjoint(trained)
    assert len(held_out | trained) == 60


def test_held_out_documents_of_which_none_can_be_used_are_an_error(make_config, tokenizer, tmp_path):
    (tmp_path / "rest.jsonl").write_text("not json\n")
    sources = {"digits": {"kind": "digits"}, "rest": {"path": f"{tmp_path}/rest.jsonl", "weight": 0}}
    with pytest.raises(InputError, match="None of the first 10 held-out documents of 'rest' can be used"):
        held_out_rows(make_config(sources=sources, max_left_out=0.9), tokenizer, "rest", 10)
