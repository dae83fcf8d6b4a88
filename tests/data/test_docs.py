"""Every source in the table of docs/data.md is one that reads, from files as people have them."""

import ast
import contextlib
import dataclasses
import gzip
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.audio.features import MAX_SAMPLES, num_frame_places, num_frames, num_soft_tokens
from gemma4_jax.config import AudioConfig
from gemma4_jax.data.iterator import read_counters
from gemma4_jax.data.pack import RowShape
from gemma4_jax.data.pipeline import held_out_rows, make_train_iterator
from gemma4_jax.data.sources import KINDS
from gemma4_jax.launch import cli, command_line
from tests.data.test_kinds import save
from tests.data.test_sounds import chirp, encoded

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SOURCES = [
    ast.literal_eval(source)
    for source in re.findall(r"\| `(\{'.*\})` \|$", PAGE.read_text(), re.MULTILINE)
    if "'tfds'" not in source  # tests/data/test_sources.py has it
]
AUDIO = AudioConfig(embed_dim=16, num_layers=1, num_heads=2, subsampling_channels=(8, 4), output_dim=12)
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def png():
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


def flac():
    return encoded(chirp(0.5, 16_000), form="FLAC")


def asked(*content):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "A cat."}]


IMAGE = {"bytes": png(), "path": "a.png"}
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
LLAVA = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]
RECORDS = {
    "chat.jsonl": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
    "sharegpt.json": [{"id": "a", "conversations": TURNS}],
    "llava.json": [{"id": "1", "image": "a.png", "conversations": LLAVA}, {"id": "2", "conversations": TURNS}],
    "alpaca.json": [{"instruction": "Add.", "input": "1 + 1", "output": "2", "text": "Below is an instruction"}],
    "prompts.jsonl.gz": [{"prompt": "Hi", "completion": "Hello"}],
    "questions.jsonl": [{"question": "Hi", "answer": "Hello"}],
    "captions.jsonl": [{"image": "pictures/a.png", "caption": "a cat"}],
    "segments.jsonl": [
        {"segments": [{"image": "pictures/a.png"}, {"text": "What? ", "loss": False}, {"text": "A cat."}]}
    ],
    "vision-0.parquet": [{"images": [IMAGE], "messages": asked({"type": "image"}, {"type": "text", "text": "What?"})}],
    "vision-1.parquet": [{"images": [IMAGE], "messages": asked({"type": "text", "text": "What?"})}],
    "questions.parquet": [{"images": [IMAGE], "texts": [{"user": "What?", "assistant": "A cat.", "source": "vqa"}]}],
    "web.parquet": [{"texts": ["A cat:", None], "images": [None, {"bytes": png(), "path": None}]}],
    "speech.jsonl": [{"audio": "pictures/a.flac", "text": "all the text"}],
    "speech.parquet": [{"audio": {"bytes": flac(), "path": "a.flac"}, "transcription": "all the text"}],
    "videos.jsonl": [{"messages": asked({"type": "video", "video": ["pictures/a.png"] * 2, "fps": 1})}],
    "frames.jsonl": [{"frames": ["pictures/a.png"] * 2, "fps": 1, "text": "a cat"}],
    "text.parquet": [{"text": "all the text", "url": "https://example.org", "language": "en"}],
    "content.parquet": [{"content": "all the text"}],
}
"""File -> its records; each record has the shape of a set that is on the hub."""


def with_parts(messages):
    """As Arrow has them: every content of one type."""
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, records in RECORDS.items():
        path = folder / name
        if path.suffix == ".parquet":
            arrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            rows = [
                record | ({"messages": with_parts(record["messages"])} if "messages" in record else {})
                for record in records
            ]
            parquet.write_table(arrow.Table.from_pylist(rows), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(records, indent=1))
        else:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(png())
    (folder / "pictures" / "a.flac").write_bytes(flac())
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("all the text")
    save(folder / "saved" / "train", [{"text": "all the text"}])
    (folder / "records").mkdir()
    array_record_module = pytest.importorskip("array_record.python.array_record_module")
    writer = array_record_module.ArrayRecordWriter(str(folder / "records" / "0.array_record"), "group_size:1")
    writer.write(b'{"text": "all the text"}')
    writer.close()
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for field, content in {"jpg": png(), "txt": b"a cat", "json": b'{"url": "https://example.org"}'}.items():
                member = tarfile.TarInfo(f"{shard:05}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def test_the_table_has_every_kind_of_record():
    named = {name for source in SOURCES for name in RECORDS if Path(name).match(source["path"])}
    assert named == RECORDS.keys()
    assert {source.get("kind", "jsonl") for source in SOURCES} == KINDS.keys() - {
        "digits",
        "python",
        "tfds",
        "prepared",
    }  # which have tests of their own


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source["path"])
def test_a_source_of_the_table_is_read_as_it_stands(source, folder, tokenizer, monkeypatch):
    monkeypatch.chdir(folder)
    config = command_line.from_command_line(["--config=quickstart", f"--config.data.sources={{'mine': {source}}}"])
    if "speech" in source["path"]:
        data = dataclasses.replace(config.data, frames_per_row=600)
        config = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, audio=AUDIO))
    iterator = make_train_iterator(config.resolved(), tokenizer)
    batch = next(iterator)
    counters = {name: count for name, count in read_counters(iterator)["mine"].items() if count}
    iterator.close()
    assert counters.keys() <= {"read", "documents", "images"}  # nothing is left out
    has_images = any(
        word in str(source) for word in ("llava", "vision", "ques", "tar", "capt", "web", "segm", "frames", "videos")
    )
    assert ("images" in counters) == (has_images and source["path"] != "questions.jsonl")
    learned = tokenizer.decode(batch.targets[0][batch.loss_weights[0] > 0].tolist())
    assert re.search(r"Hello<turn\|>|cat\.?<(turn\||eos)>|2<turn\||all the text<eos>|A cat:", learned)
    assert not re.search("What|Hi|Add", learned)


def test_the_command_of_the_page_writes_a_preview(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (command,) = re.findall(r"^    gemma4 (preview .*)$", PAGE.read_text(), re.MULTILINE)
    config, sources = re.fullmatch(r"preview (\S+) (.*)", command).groups()
    assert cli.main(["preview", config, sources.replace('"', "")]) == 0
    assert "Hello" in re.sub("<[^>]*>", "", (folder / "preview.html").read_text())


def test_the_command_for_sounds_makes_room_for_them():
    (command,) = re.findall(r"^    gemma4 train (.*)$", PAGE.read_text(), re.MULTILINE)
    *flags, sources = re.fullmatch(r"(\S+) (\S+) (\S+) (\S+) (.*)", command).groups()
    config = command_line.from_command_line([*flags, sources.replace('"', "")]).resolved()
    shape = RowShape.from_config(config.data, config.model)
    assert (shape.frames, shape.mel_bins) == (num_frame_places(num_frames(MAX_SAMPLES)), 128)
    assert num_soft_tokens(shape.frames) < shape.tokens


def test_what_the_command_of_the_page_prepares_is_what_the_source_of_the_page_reads(folder, tokenizer, monkeypatch):
    monkeypatch.chdir(folder)
    Path("chat.jsonl").write_text(100 * (json.dumps(RECORDS["chat.jsonl"][0]) + "\n"))  # some of them are held out
    (command,) = re.findall(r"^    gemma4 (prepare .*)$", PAGE.read_text(), re.MULTILINE)
    assert cli.main(shlex.split(command)) == 0
    (source,) = re.findall(r"the source `(\{'kind': 'prepared'.*?\})`", PAGE.read_text())
    flags = ["--config=quickstart", f"--config.data.sources={{'mine': {source}}}"]
    config = command_line.from_command_line(flags).resolved()
    with contextlib.closing(make_train_iterator(config, tokenizer)) as batches:
        assert "Hello<turn|>" in tokenizer.decode(next(batches).tokens[0].tolist())
    assert held_out_rows(config, tokenizer, "mine", 9)
