"""Recordings as people have them, from their files to a step that trains the audio tower."""

import contextlib
import dataclasses
import io
import json
import pickle
import tarfile

import jax
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.audio.features import SAMPLE_RATE, num_frame_places, num_frames, num_soft_tokens
from gemma4_jax.batch import FIELDS
from gemma4_jax.config import AudioConfig
from gemma4_jax.data.document import Document, Sound, Text
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.iterator import read_counters
from gemma4_jax.data.pack import size_of
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.data.prepare import prepare
from gemma4_jax.data.sound_pieces import cut_sounds
from gemma4_jax.sharding import batch_sharding, make_mesh
from gemma4_jax.train.program import make_program
from gemma4_jax.train.state import create_state
from tests.data.test_sounds import chirp, encoded
from tests.train import tiny

AUDIO = AudioConfig(embed_dim=16, num_layers=1, num_heads=2, subsampling_channels=(8, 4), output_dim=12)


def config(**source):
    given = tiny.get_config()
    given.data.seq_len, given.data.batch_size, given.data.frames_per_row = 160, 2, 600
    given.data.images_per_row = given.data.patches_per_row = 0
    given.data.sources = {"mine": source}
    run = tiny.typed(given)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, audio=AUDIO)).resolved()


TALK = [
    {"role": "user", "content": [{"type": "audio", "audio": "b.mp3"}, {"type": "text", "text": "What is said?"}]},
    {"role": "assistant", "content": "go"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    flac, mp3 = encoded(chirp(1.5, 16_000), form="FLAC"), encoded(chirp(1.5, 48_000), rate=48_000, form="MP3")
    (folder / "a.flac").write_bytes(flac)
    (folder / "b.mp3").write_bytes(mp3)
    records = {
        "fleurs": {"audio": "a.flac", "transcription": "go", "id": 3},
        "voices": {"audio": {"path": "b.mp3", "bytes": None}, "sentence": "go", "locale": "en"},
        "talk": {"messages": TALK},
        "beside": {"messages": [{"role": "user", "content": "<audio>What?"}, TALK[1]], "audios": ["a.flac"]},
        "spelt": {"segments": [{"text": "Hear: ", "loss": False}, {"audio": "a.flac"}, {"text": "go"}]},
        "decoded": {
            "audio": {"path": "a.flac", "array": chirp(1.5, 8_000).tolist(), "sampling_rate": 8000},
            "text": "go",
        },
    }
    for name, record in records.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"audio": {"bytes": flac, "path": "84-121123-0000.flac"}, "text": "go", "speaker_id": 84}]
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "libri.parquet")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name, content in {"1.mp3": mp3, "1.txt": b"go"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


SOURCES = [
    *({"path": f"{name}.jsonl"} for name in ("fleurs", "voices", "talk", "beside", "spelt", "decoded")),
    {"path": "libri.parquet", "kind": "parquet", "task": "speech", "options": {"prompt": "Write it down: "}},
    {"path": "shard.tar", "kind": "webdataset"},
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source["path"])
def test_a_recording_and_its_words_are_a_document(source, folder, tokenizer, monkeypatch):
    monkeypatch.chdir(folder)
    iterator = make_train_iterator(config(**source), tokenizer)
    batch = next(iterator)
    counters = {name: count for name, count in read_counters(iterator)["mine"].items() if count}
    iterator.close()
    assert counters.keys() == {"read", "documents"}
    row, roles = batch.tokens[0], tokenizer.tokens
    first = row[batch.segment_ids[0] == 1].tolist()
    # 1.5 s are 149 frames, and these 38 soft tokens.
    assert first.count(roles.audio) == 38
    assert first[first.index(roles.begin_audio) + 39] == roles.end_audio
    assert (batch.frame_sound_ids[0] == 1).sum() == 149
    learned = tokenizer.decode(batch.targets[0][(batch.loss_weights[0] > 0) & (batch.segment_ids[0] == 1)].tolist())
    assert learned in ("go<eos>", "go<turn|>")


def test_a_recording_of_a_minute_is_heard_in_pieces(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.flac").write_bytes(encoded(chirp(61, 8000), rate=8000, form="FLAC"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"audio": "a.flac", "text": "go"}))
    encode = Encoder(tokenizer, None, 70, AUDIO)
    example = encode(open_documents(config(path="a.jsonl").data.sources["mine"])[0]).read()
    roles = tokenizer.tokens
    lengths = 525, 525, 475  # of 21 + 21 + 19 s
    heard = [t for n in lengths for t in (roles.begin_audio, *[roles.audio] * n, roles.end_audio)]
    assert example.tokens.tolist() == [roles.bos, *heard, *tokenizer.encode("go"), roles.eos]
    assert [num_soft_tokens(len(sound)) for sound in example.sounds] == [525, 525, 475]


def test_what_waits_holds_no_features(tokenizer, monkeypatch):
    """But tokens and the file, once for all of its pieces."""
    monkeypatch.setattr("gemma4_jax.data.example.log_mel", lambda *_: pytest.fail("decoded before its row came"))
    content = encoded(np.random.default_rng(0).normal(size=61 * 8000) * 0.1, rate=8000, form="MP3")
    document = cut_sounds(Document((Sound(content), Text("go")), "one"))
    example = Encoder(tokenizer, None, 70, AUDIO)(document)
    assert size_of(example)[3] == sum(num_frame_places(num_frames(n * SAMPLE_RATE)) for n in (21, 21, 19))
    assert example.text.sounds == ()
    assert [sound.content is content for sound in example.sounds] == [True] * 3
    assert example.num_bytes == len(content)
    of_tokens = example.text.tokens.nbytes + example.text.carries_loss.nbytes
    assert len(pickle.dumps(example)) < len(content) + of_tokens + 2000


@pytest.fixture
def damaged(folder, tmp_path):
    """Recordings of several lengths of which some end too early, in JSON Lines, and no more than three in a row."""
    lines = []
    for i in range(24):
        whole = encoded(np.random.default_rng(i).normal(size=4000 + 700 * i) * 0.1, form="FLAC")
        (tmp_path / f"{i}.flac").write_bytes(whole[: len(whole) // (2 if i % 5 == 3 else 1)])
        lines.append(json.dumps({"audio": f"{i}.flac", "text": f"number {i}"}) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(lines))
    return config(path=str(tmp_path / "a.jsonl"))


def texts(batch, tokenizer):
    """What is learned of each document of a batch."""
    return [
        tokenizer.decode(batch.targets[b][(batch.segment_ids[b] == i) & (batch.loss_weights[b] > 0)].tolist())
        for b in range(len(batch.tokens))
        for i in range(1, batch.segment_ids[b].max() + 1)
    ]


def test_a_recording_that_proves_damaged_leaves_its_place_empty(damaged, tokenizer):
    with contextlib.closing(make_train_iterator(damaged, tokenizer)) as batches:
        seen = [text for _ in range(30) for text in texts(next(batches), tokenizer)]
        counters = read_counters(batches)["mine"]
    assert set(seen) == {f"number {i}<eos>" for i in range(24) if i % 5 != 3}
    assert counters["documents"] == len(seen)
    assert counters["unreadable"] > 0


def test_going_on_decodes_nothing_that_waits_and_repeats_nothing(damaged, tokenizer, monkeypatch):
    with contextlib.closing(make_train_iterator(damaged, tokenizer)) as batches:
        states, rows = [], []
        for _ in range(12):
            states.append(json.loads(json.dumps(batches.get_state())))
            rows.append(next(batches))
    with contextlib.closing(make_train_iterator(damaged, tokenizer)) as batches:
        with monkeypatch.context() as patch:
            patch.setattr("gemma4_jax.data.example.log_mel", lambda *_: pytest.fail("decoded"))
            batches.set_state(states[5])
        for i in range(5, 12):
            assert batches.get_state() == states[i]
            batch = next(batches)
            for name in FIELDS:
                np.testing.assert_array_equal(getattr(batch, name), getattr(rows[i], name), err_msg=name)


def test_prepared_recordings_are_read_to_the_bit(damaged, tokenizer, tmp_path):
    prepare(damaged, tmp_path / "out", report=lambda _: None)
    again = config(kind="prepared", path=str(tmp_path / "out" / "mine"))
    found = []
    for run in (damaged, again):
        with contextlib.closing(make_train_iterator(run, tokenizer)) as batches:
            found.append(([next(batches) for _ in range(12)], read_counters(batches)))
    assert found[0][1] == found[1][1]
    for batch, other in zip(found[0][0], found[1][0], strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name), err_msg=name)


def test_a_row_without_room_for_a_recording_says_so(folder, tokenizer, monkeypatch):
    monkeypatch.chdir(folder)
    run = config(path="fleurs.jsonl")
    with pytest.raises(Exception, match=r"with 152 frames of sounds, do not fit .* data\.frames_per_row=100"):
        next(
            make_train_iterator(
                dataclasses.replace(run, data=dataclasses.replace(run.data, frames_per_row=100)), tokenizer
            )
        )
    with pytest.raises(Exception, match=r"frames_per_row=600 .* no audio tower"):
        make_train_iterator(dataclasses.replace(run, model=dataclasses.replace(run.model, audio=None)), tokenizer)


@pytest.mark.slow
def test_the_audio_tower_trains(folder, tokenizer, monkeypatch):
    monkeypatch.chdir(folder)
    run = config(path="libri.parquet", kind="parquet")
    iterator = make_train_iterator(run, tokenizer)
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = make_program(run, mesh)
        state = create_state(program.state, program.config)
        before = {path: np.array(v.get_value()) for path, v in nnx.to_flat_state(state.trained) if path[0] == "audio"}
        losses = []
        for _ in range(4):
            state, metrics = program.train_step(state, jax.device_put(next(iterator), batch_sharding(mesh)))
            losses.append(float(metrics.means["loss"]))
    iterator.close()
    after = {path: np.array(v.get_value()) for path, v in nnx.to_flat_state(state.trained) if path[0] == "audio"}
    assert before
    moved = [path for path in before if not np.array_equal(before[path], after[path])]
    assert len(moved) > 0.8 * len(before)
    assert losses[-1] < losses[0]
