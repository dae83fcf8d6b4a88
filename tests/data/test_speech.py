"""Recordings as people have them, from their files to a step that trains the audio tower."""

import dataclasses
import io
import json
import tarfile

import jax
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.audio.features import num_soft_tokens
from gemma4_jax.config import AudioConfig
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.iterator import read_counters
from gemma4_jax.data.pipeline import make_train_iterator
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
    *({"path": f"{name}.jsonl"} for name in ("fleurs", "voices", "talk", "beside", "spelt")),
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
