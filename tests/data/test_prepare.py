"""Prepared data: a run reads from it what it reads from the source, to the bit, however it was prepared."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.batch import FIELDS
from gemma4_jax.config import AudioConfig
from gemma4_jax.data import prepare as module
from gemma4_jax.data.document import Document
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.example import Example, SizedExample, SizedImage, SizedSound
from gemma4_jax.data.iterator import read_counters
from gemma4_jax.data.packer import WAITING_BYTES
from gemma4_jax.data.pipeline import held_out_rows, held_out_source, make_encoder, make_train_iterator
from gemma4_jax.data.prepare import prepare
from gemma4_jax.data.prepared import MANIFEST, array_record, encoding_of, from_record, to_record
from gemma4_jax.errors import InputError
from gemma4_jax.launch import cli
from gemma4_jax.launch.prepare import Step

NUM_DOCUMENTS, NUM_SHARDS, NUM_BATCHES = 300, 5, 40

DOCS = Path(__file__).parents[2] / "docs"


def picture(width, height, rng, file_format="JPEG"):
    file = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, file_format)
    return file.getvalue()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """JSON Lines of texts, captions, pages of the web and chats; some of their images are gone, or end too early."""
    folder, rng = tmp_path_factory.mktemp("mine"), np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.jpg").write_bytes(picture(20 + 9 * i, 60, rng))
    (folder / "cut.jpg").write_bytes(picture(90, 60, rng)[:-2000])
    lines = []
    for i in range(NUM_DOCUMENTS):
        image = "cut.jpg" if i % 31 == 7 else "none.jpg" if i % 37 == 5 else f"{i % 12}.jpg"
        match i % 4:
            case 0:
                lines.append({"text": f"document {i}" + " and more" * int(rng.integers(0, 90))})
            case 1:
                lines.append({"image": image, "caption": f"picture {i}"})
            case 2:
                lines.append({"texts": [f"page {i}", None, "goes on"], "images": [None, image, None]})
            case 3:
                asked = {"role": "user", "content": f"question {i}"}
                lines.append({"messages": [asked, {"role": "assistant", "content": f"answer {i}"}]})
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def from_source(make_config, records):
    """A function from changes of `data` to a config that reads the records, and the like of one that is prepared."""

    def make(kind="jsonl", path=records, held_out=0.2, weight=1.0, **changes):
        source = {"kind": kind, "path": str(path), "held_out": held_out, "weight": weight}
        return make_config(sources={"mine": source}, **changes)

    return make


@pytest.fixture(scope="module")
def prepared(from_source, tmp_path_factory):
    """OUT of a preparation that nothing interrupted."""
    out = tmp_path_factory.mktemp("prepared")
    assert prepare(from_source(), out, num_shards=NUM_SHARDS, report=lambda _: None) == {"mine": True}
    return out


def read(config, tokenizer):
    """(batches, counters) of a run."""
    with contextlib.closing(make_train_iterator(config, tokenizer)) as batches:
        return [next(batches) for _ in range(NUM_BATCHES)], read_counters(batches)


KILLED = """
import os, signal, sys
from gemma4_jax.data import prepare
from gemma4_jax.launch import cli

num_left = 150
def count(self):
    global num_left
    num_left -= 1
    if not num_left:
        os.kill(os.getpid(), signal.SIGKILL)
prepare._Progress.add = count
cli.main(["prepare", *sys.argv[1:]])
"""
"""A `gemma4 prepare` that is killed within a shard."""


SCRIPT = re.search(r"```python\n(from datatrove.*?)```", (DOCS / "data.md").read_text(), re.DOTALL)[1]
"""How docs/data.md runs `gemma4 prepare` on datatrove."""

MY_CONFIG = """
import os, pathlib, signal
from gemma4_jax.configs import quickstart

def get_config():
    if pathlib.Path("kill").exists() and list(pathlib.Path("prepared").rglob("done-*")):
        os.killpg(0, signal.SIGKILL)
    config = quickstart.get_config()
    config.data.seq_len = 352
    config.data.sources = {"mine": {"path": %r, "held_out": 0.2}}
    return config
"""
"""A config that kills every process of its job as a task begins after the first shard is done."""


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_reads_the_same_batches_to_the_bit(prepared, from_source, tokenizer):
    batches, counters = read(from_source(), tokenizer)
    again, counters_again = read(from_source("prepared", prepared / "mine", 0.0), tokenizer)
    for batch, other in zip(batches, again, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name), err_msg=name)
            assert getattr(batch, name).dtype == getattr(other, name).dtype
    assert counters == counters_again
    assert min(counters["mine"][name] for name in ("unreadable", "images_missing", "images")) > 0


def test_held_out_documents_stay_held_out(prepared, from_source, tokenizer):
    config = from_source("prepared", prepared / "mine", 0.0)
    assert held_out_source(config.data) == "mine"
    rows = held_out_rows(from_source(), tokenizer, "mine", 100)
    for row, other in zip(rows, held_out_rows(config, tokenizer, "mine", 100), strict=True):
        for example, again in zip(row, other, strict=True):
            assert example.name == again.name
            np.testing.assert_array_equal(example.tokens, again.tokens)
            for image, image_again in zip(example.images, again.images, strict=True):
                np.testing.assert_array_equal(image.patches, image_again.patches)


def test_rows_choose_among_as_many_documents_where_their_files_are_large(make_config, tokenizer, tmp_path, monkeypatch):
    """The look-ahead ends at so many bytes of files: what is prepared counts those that it was made of."""
    monkeypatch.setattr("gemma4_jax.data.packer.WAITING_BYTES", WAITING_BYTES // 2**11)
    rng = np.random.default_rng(1)
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(picture(10 + i, 40, rng, "PNG"))
    lines = [{"image": f"{i}.png", "caption": f"picture {i}" + " x" * (i % 50)} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = make_config(sources={"mine": {"path": str(tmp_path / "a.jsonl")}}, batch_size=1)
    prepare(source, tmp_path / "out", report=lambda _: None)
    again = make_config(sources={"mine": {"kind": "prepared", "path": str(tmp_path / "out" / "mine")}}, batch_size=1)
    for batch, other in zip(read(source, tokenizer)[0], read(again, tokenizer)[0], strict=True):
        np.testing.assert_array_equal(batch.tokens, other.tokens)


def test_a_source_of_weight_0_is_prepared_for_evaluation_alone(make_config, records, tokenizer, tmp_path):
    def config(**source):
        return make_config(sources={"python": {"kind": "python"}, "mine": {"weight": 0.0, **source}})

    prepare(config(path=str(records)), tmp_path, sources=["mine"], report=lambda _: None)
    again = config(kind="prepared", path=str(tmp_path / "mine"))
    names = [[e.name for e in row] for row in held_out_rows(config(path=str(records)), tokenizer, "mine", 200)]
    assert names == [[e.name for e in row] for row in held_out_rows(again, tokenizer, "mine", 200)]


def test_the_manifest_says_what_it_was_made_of_and_what_is_left_out(prepared):
    manifest = json.loads((prepared / "mine" / MANIFEST).read_text())
    assert manifest["documents"]["train"] + manifest["documents"]["held_out"] == NUM_DOCUMENTS
    assert manifest["source"] == {"kind": "jsonl", "task": "auto", "columns": {}, "options": {}, "held_out": 0.2}
    assert manifest["counters"]["read"] == NUM_DOCUMENTS
    assert manifest["counters"]["unreadable"] == len(manifest["left_out"])
    assert any("none.jpg" in reason for reason in manifest["left_out"])
    assert any("cut.jpg" in reason for reason in manifest["left_out"])
    for side in ("train", "held_out"):
        assert sum(s["documents"] for s in manifest["shards"] if s["side"] == side) == manifest["documents"][side]


class TestRestart:
    def test_one_that_is_killed_goes_on_and_makes_the_same_bytes(self, prepared, records, tmp_path):
        overrides = {"data.sources": {"mine": {"path": str(records), "held_out": 0.2}}, "data.seq_len": 352}
        command = ["--config=quickstart", *(f"--config.{name}={value}" for name, value in overrides.items())]
        command += [f"--out={tmp_path}", f"--num_shards={NUM_SHARDS}", "--workers=1"]
        assert subprocess.run([sys.executable, "-c", KILLED, *command], check=False).returncode == -signal.SIGKILL
        done = {path.name.split("-", 1)[1].split(".")[0] for path in tmp_path.glob("mine/train/done-*")}
        assert {path.name.split("-", 1)[1].split(".")[0] for path in tmp_path.glob("mine/train/text-*")} == done
        assert 0 < len(done) < NUM_SHARDS
        assert cli.main(["prepare", *command]) == 0
        assert bytes_of(tmp_path) == bytes_of(prepared)

    def test_tasks_of_an_array_job_end_in_any_order(self, prepared, from_source, tmp_path):
        ended = [
            prepare(from_source(), tmp_path, num_shards=NUM_SHARDS, part=(i, 3), report=lambda _: None)["mine"]
            for i in (2, 0, 1)
        ]
        assert ended == [False, False, True]
        assert bytes_of(tmp_path) == bytes_of(prepared)

    def test_processes_make_the_same_bytes(self, prepared, from_source, tmp_path):
        told = []
        prepare(from_source(), tmp_path, num_shards=NUM_SHARDS, num_workers=2, report=told.append)
        assert bytes_of(tmp_path) == bytes_of(prepared)
        assert told[-1].startswith(f"{NUM_DOCUMENTS} of {NUM_DOCUMENTS} documents, ")

    def test_two_that_prepare_the_same_do_no_harm(self, prepared, from_source, tmp_path):
        with ThreadPoolExecutor(2) as threads:
            run = lambda _: prepare(from_source(), tmp_path, num_shards=NUM_SHARDS, report=lambda _: None)  # noqa: E731
            assert list(threads.map(run, range(2))) == [{"mine": True}] * 2
        assert bytes_of(tmp_path) == bytes_of(prepared)

    def test_a_shard_that_is_damaged_is_made_anew(self, prepared, from_source, tmp_path):
        out = shutil.copytree(prepared, tmp_path / "out")
        damaged = out / "mine" / "train" / "media-00002-of-00005.bin"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        prepare(from_source(), out, report=lambda _: None)
        assert bytes_of(out) == bytes_of(prepared)


class TestDatatrove:
    @pytest.fixture
    def run_script(self, records, tmp_path):
        """A function that runs the script of the docs as it stands, in processes of its own: its exit status."""
        pytest.importorskip("datatrove")
        (tmp_path / "my_config.py").write_text(MY_CONFIG % str(records))
        (tmp_path / "script.py").write_text(SCRIPT)
        return lambda: subprocess.run([sys.executable, "script.py"], cwd=tmp_path, start_new_session=True).returncode

    def test_its_executor_goes_on_after_a_kill_and_makes_the_same_bytes(self, run_script, from_source, tmp_path):
        (tmp_path / "kill").touch()
        assert run_script() == -signal.SIGKILL
        done = set((tmp_path / "prepared").rglob("done-*"))
        (tmp_path / "kill").unlink()
        assert run_script() == 0
        assert done < set((tmp_path / "prepared").rglob("done-*"))
        assert len(list((tmp_path / "prepared-logs" / "completions").iterdir())) == 8
        prepare(from_source(), tmp_path / "alone", report=lambda _: None)
        assert bytes_of(tmp_path / "prepared") == bytes_of(tmp_path / "alone")
        logs = [path.read_text() for path in (tmp_path / "prepared-logs" / "logs").iterdir()]
        assert any("prepared prepared/mine" in log for log in logs)

    def test_a_task_that_fails_has_no_mark(self, tmp_path):
        executor = pytest.importorskip("datatrove.executor").LocalPipelineExecutor
        steps = [Step(["--config=quickstart", f"--out={tmp_path / 'out'}", "--source=mine"])]
        with pytest.raises(InputError, match="it must be one of digits, python"):
            executor(steps, workers=1, logging_dir=str(tmp_path / "logs")).run()
        assert not (tmp_path / "logs" / "completions").exists()


class TestBadInput:
    def prepared_again(self, prepared, tmp_path):
        return shutil.copytree(prepared / "mine", tmp_path / "mine")

    def refuses(self, from_source, tokenizer, folder, match, **changes):
        with pytest.raises(InputError, match=match):
            make_train_iterator(from_source("prepared", folder, 0.0, **changes), tokenizer)

    def test_a_folder_of_another_plan(self, prepared, from_source, tmp_path):
        with pytest.raises(InputError, match=r"was begun with another num_shards, .*: give another --out"):
            prepare(from_source(), prepared, num_shards=NUM_SHARDS + 1)
        with pytest.raises(InputError, match=r"was begun with another encoding, .*: give another --out"):
            prepare(from_source(soft_tokens_per_image=140, seq_len=512), prepared)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").touch()
        with pytest.raises(InputError, match="holds something else: give another --out"):
            prepare(from_source(), tmp_path)

    def test_a_disk_without_room(self, from_source, tmp_path, monkeypatch):
        usage = namedtuple("Usage", "free")(100)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match=r"takes about 0.0 GB, and 0.0 GB are free: make room, or give --out on"):
            prepare(from_source(), tmp_path)

    def test_too_many_documents_left_out(self, from_source, tmp_path):
        with pytest.raises(InputError, match=r"were left out \(1 unreadable\), .* allow more than data.max_left_out=0"):
            prepare(from_source(max_left_out=0.0), tmp_path)

    def test_a_source_without_documents_of_its_own(self, make_config, tmp_path):
        told = []
        sources = {"digits": {"kind": "digits"}}
        assert prepare(make_config(sources=sources), tmp_path, report=told.append) == {}
        assert told == ["digits makes its documents up as they are read: there is nothing to prepare"]

    def test_no_array_record(self, from_source, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
        with pytest.raises(InputError, match="needs array_record"):
            prepare(from_source(), tmp_path)

    def test_another_tokenizer(self, prepared, from_source, tokenizer, tmp_path):
        folder = self.prepared_again(prepared, tmp_path)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["encoding"]["tokenizer"] = "00"
        (folder / MANIFEST).write_text(json.dumps(manifest))
        self.refuses(from_source, tokenizer, folder, "was prepared with another tokenizer, or chat template, than")

    @pytest.mark.parametrize("field", ["patch_size", "pooling_size", "mel_bins"])
    def test_another_model(self, field, prepared, from_source, tokenizer, tmp_path):
        folder = self.prepared_again(prepared, tmp_path)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["encoding"][field] = 7
        (folder / MANIFEST).write_text(json.dumps(manifest))
        self.refuses(from_source, tokenizer, folder, f"was prepared with {field}=7, .* prepare it again for it")

    def test_a_larger_budget(self, prepared, from_source, tokenizer, tmp_path):
        folder = self.prepared_again(prepared, tmp_path)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["encoding"]["soft_tokens_per_image"] = 280
        (folder / MANIFEST).write_text(json.dumps(manifest))
        self.refuses(from_source, tokenizer, folder, "soft_tokens_per_image=280, and this run has 70")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (None, "has no manifest.json"),
            ("{", "manifest.json is damaged"),
            ("[]", "manifest.json is damaged"),
            ('{"format": 1}', "another version of this package"),
            ('{"format": 2, "encoding": {}}', "manifest.json is damaged"),
            ('{"format": 2, "encoding": {"tokenizer": [], "soft_tokens_per_image": 70}}', "manifest.json is damaged"),
        ],
    )
    def test_a_manifest_that_says_nothing(self, content, match, from_source, tokenizer, tmp_path):
        if content is not None:
            (tmp_path / MANIFEST).write_text(content)
        self.refuses(from_source, tokenizer, tmp_path, match)

    def test_a_file_that_ends_too_early(self, prepared, from_source, tokenizer, tmp_path):
        folder = self.prepared_again(prepared, tmp_path)
        path = folder / "train" / "media-00001-of-00005.bin"
        path.write_bytes(path.read_bytes()[:-1])
        self.refuses(from_source, tokenizer, folder, r"media-00001-of-00005.bin is damaged, [\d,]+ bytes of")

    def test_check_finds_bytes_that_have_changed(self, prepared, tmp_path, capsys):
        folder = self.prepared_again(prepared, tmp_path)
        assert cli.main(["check", str(folder)]) == 0
        assert capsys.readouterr().out.startswith(f"intact, {2 * NUM_SHARDS} shards of ")
        path = folder / "held_out" / "media-00001-of-00005.bin"
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
        assert cli.main(["check", str(folder)]) == 2
        assert "1 shards of" in capsys.readouterr().err

    def test_bytes_that_have_changed_cost_their_documents(self, prepared, from_source, tokenizer, tmp_path):
        folder = self.prepared_again(prepared, tmp_path)
        path = folder / "train" / "text-00001-of-00005.arrayrecord"
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 255
        path.write_bytes(content)
        counters = read(from_source("prepared", folder, 0.0), tokenizer)[1]["mine"]
        assert 0 < counters["unreadable"] < counters["read"] / 2


class TestRecords:
    @pytest.fixture
    def encode(self, model, tokenizer):
        return Encoder(tokenizer, model.vision, 70, AudioConfig())

    def test_a_record_has_all_that_an_example_has(self):
        """A field that is new must go into the record too, and `prepared.FORMAT` up by one."""
        fields = {
            kind: {field.name for field in dataclasses.fields(kind)} for kind in (Example, SizedImage, SizedSound)
        }
        of_text = {"tokens", "carries_loss", "name", "context", "images_missing"}
        assert fields[Example] == of_text | {"images", "sounds", "source"}  # written apart, and known by the run
        of_image = {"height", "width", "max_soft_tokens", "name", "may_be_missing"}
        assert fields[SizedImage] == of_image | {"content", "patch_size", "pooling_size"}
        # `seconds` say what `num_bytes` is, which is written.
        assert fields[SizedSound] == {"num_frames", "name", "content", "mel_bins", "seconds"}

    def test_sounds_come_back(self, encode, tmp_path):
        roles, rng = encode.tokenizer.tokens, np.random.default_rng(0)
        features = rng.standard_normal((40, encode.audio.num_mel_bins)).astype(np.float32)
        media = tmp_path / "media"
        media.write_bytes(b"before" + features.tobytes())
        tokens = [roles.bos, *2 * [roles.begin_audio, *[roles.audio] * 10, roles.end_audio], 5]
        loss = [False] * (len(tokens) - 1) + [True]
        text = Example(np.array(tokens, np.int32), np.array(loss), (), "ä", context=3, images_missing=2)
        sound = SizedSound(b"a file", 40, encode.audio.num_mel_bins, name="a.wav")
        record = to_record(SizedExample(text, sounds=(sound, sound)), [(6, ""), (0, "it is none.")])
        again = encode(Document((), encoded=from_record(record, media, encoding_of(encode))))
        assert (again.text.name, again.text.context, again.text.images_missing) == ("ä", 3, 2)
        np.testing.assert_array_equal(again.text.tokens, text.tokens)
        np.testing.assert_array_equal(again.text.carries_loss, text.carries_loss)
        assert again.num_bytes == 2 * len(b"a file")
        np.testing.assert_array_equal(again.sounds[0].read(), features)
        with pytest.raises(InputError, match=r"^ä: a\.wav: it is none\.$"):
            again.read()

    def test_whatever_stands_in_a_record_is_an_example_or_a_sentence(self, encode, prepared, make_config, tokenizer):
        """Of records of every kind, whole, cut, and with a few bytes changed."""
        reader = array_record().ArrayRecordReader(str(prepared / "mine" / "train" / "text-00000-of-00005.arrayrecord"))
        encode, rng = make_encoder(make_config(), tokenizer), np.random.default_rng(0)
        num_good = num_bad = 0
        for record in reader.read_all():
            for trial in range(30):
                changed = bytearray(record)
                for place in rng.integers(0, len(record), 2 if trial else 0):
                    changed[place] = rng.integers(256)
                stop = None if trial < 25 else int(rng.integers(len(record)))
                try:
                    example = encode(
                        Document((), encoded=from_record(bytes(changed[:stop]), Path("none"), encoding_of(encode)))
                    )
                    assert sum(image.num_soft_tokens for image in example.images) == np.sum(
                        example.text.tokens == tokenizer.tokens.image
                    )
                    num_good += 1
                except InputError:
                    num_bad += 1
        assert min(num_good, num_bad) > 100
