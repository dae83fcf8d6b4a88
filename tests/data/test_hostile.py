"""Bad and hostile records among good ones: every good one arrives, each bad one under its reason."""

import base64
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.example import Unreadable
from gemma4_jax.data.mixture import Examples
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig

GOOD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def bomb():
    """A PNG of few bytes and many pixels."""
    file = io.BytesIO()
    PIL.Image.new("1", (9000, 9000)).save(file, "PNG")
    return file.getvalue()


def with_image(**part):
    return {"messages": [{"role": "user", "content": [{"type": "image", **part}]}, GOOD[1]]}


def uri(data):
    return {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}


BAD = {
    "is nested too deeply": '{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "Expecting": '{"messages": [',
    "lies outside": json.dumps(with_image(path="../../etc/passwd")),
    "is a URL": json.dumps(with_image(url="http://127.0.0.1/a.png")),
    "is missing": json.dumps(with_image(path="gone.png")),
    "9000 x 9000 pixels is refused": json.dumps(with_image(type="image_url", image_url=uri(bomb()))),
    "cannot be decoded": json.dumps(with_image(base64=base64.b64encode(b"GIF89a").decode())),
    "500 images are refused": json.dumps({"messages": GOOD, "images": ["a.png"] * 500}),
    "lone surrogates": '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}',
    "a record of 4500001 bytes is refused": None,
    "of no known shape": '{"__class__": "os.system", "py/object": "a"}',
    "its role is": json.dumps({"messages": [{"role": "<|turn>model", "content": "a"}]}),
}  # fmt: skip
"""Reason -> a line with it."""


def line(reason):
    return BAD[reason] or '{"text": "' + "x" * (4_500_000 - 12) + '"}'


@pytest.fixture
def encode(tokenizer, model):
    return Encoder(tokenizer, model.vision, 70)


def read(documents, encode):
    """Each document as far as training reads it: with its images."""
    examples = Examples("mine", documents, encode)
    return [_with_images(examples[i]) for i in range(len(documents))]


def _with_images(example):
    try:
        return example if isinstance(example, Unreadable) else example.read()
    except InputError as error:
        return Unreadable(str(error))


def test_lines(tmp_path, encode):
    reasons = [*BAD] * 3
    with (tmp_path / "a.jsonl").open("w") as file:
        for reason in reasons:
            file.write(f"{line(reason)}\n" + 10 * (json.dumps({"messages": GOOD}) + "\n"))
    PIL.Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    examples = read(open_documents(SourceConfig("mine", path=str(tmp_path / "a.jsonl"))), encode)
    bad = [example.reason for example in examples if isinstance(example, Unreadable)]
    assert len(examples) - len(bad) == 10 * len(reasons)
    for reason, told in zip(reasons, bad, strict=True):
        assert reason in told
        assert told.startswith("a.jsonl line ")
        assert len(told) < 700


def test_samples(tmp_path, encode):
    files = []
    for i, reason in enumerate(BAD):
        files += [(f"{i}-bad.json", line(reason).encode()), (f"{i}-good.json", json.dumps({"text": "good"}).encode())]
    files += [("p.pkl", b"cos\nsystem\n(S'touch pickled'\ntR."), ("q.npy", b"\x93NUMPY\x01\0"), ("r.png", bomb())]
    files += [("s.txt", b"a"), ("s.png", bomb()), ("t.txt", b"\xff\xfe"), ("u.txt", b"good")]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    config = SourceConfig("mine", kind="webdataset", path=str(tmp_path / "a.tar"))
    examples = read(open_documents(config), encode)
    kinds = Counter(type(example).__name__ for example in examples)
    assert kinds == {"Example": len(BAD) + 1, "Unreadable": len(BAD) + 5}
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_rows(tmp_path, encode):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [b"", b"GIF89a", bomb(), None, bytes(2**20)]
    rows = [{"image": {"bytes": image, "path": None}, "text": "a"} for image in images]
    rows += [{"image": {"bytes": None, "path": "/etc/passwd"}, "text": "a"}]
    good = io.BytesIO()
    PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(good, "PNG")
    rows += [{"image": {"bytes": good.getvalue(), "path": "a.png"}, "text": "a"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    config = SourceConfig("mine", kind="parquet", path=str(tmp_path / "a.parquet"))
    examples = read(open_documents(config), encode)
    assert [isinstance(example, Unreadable) for example in examples] == [True] * 6 + [False]


def picture(seed=0):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


SOUND_THAT_IS_NONE = {"audio": {"path": "a.json"}, "text": "a"}
BAD_LINES = {
    r"Expecting|Unterminated": b'{"text": "a", "more": [',
    r"Extra data": b'{"text": "a"}{"text": "b"}',
    r"Invalid control character": b'{"text": "a\0b"}',
    r"a record must have columns": b"[1, 2]",
    r"of no known shape": b"{}",
    r"its columns, none": b'{"text": null}',
    r"text cannot be \{": b'{"text": {"a": 1}}',
    r"text cannot be nan": b'{"text": NaN}',
    r"text cannot be -inf": b'{"text": -1e999}',
    r"Exceeds the limit": b'{"text": ' + b"9" * 5000 + b"}",
    r"nested too deeply": b'{"text": "a", "meta": ' + b"[" * 990 + b"]" * 990 + b"}",
    r"JSON is nested too deeply: at most": b'{"a":' * 60_000,
    r"codec can't decode": b'{"text": "\xff\xfe"}',
    r"lone surrogates": b'{"text": "\\udfff"}',
    r"a document of 2500000 characters is refused": b'{"text": "' + b"x" * 2_500_000 + b'"}',
    r"a record of 30000\d\d\d bytes is refused": b'{"text": "' + b"x" * 30_000_000 + b'"}',
    r"'\.\./\.\./etc/passwd' lies outside": b'{"image": "../../etc/passwd", "text": "a"}',
    r"'/etc/passwd' lies outside": b'{"image": "/etc/passwd", "text": "a"}',
    r"is a URL": b'{"image": "http://169.254.169.254/latest", "text": "a"}',
    r"a\.json.* cannot be decoded": b'{"image": "a.json", "text": "a"}',
    r"a\.json: A sound file cannot be decoded|no audio tower": json.dumps(SOUND_THAT_IS_NONE).encode(),
    r"9000 x 9000 pixels is refused": json.dumps({"image": uri(bomb())["url"], "text": "a"}).encode(),
    r"base64 cannot be read": b'{"image": "data:image/png;base64,!!", "text": "a"}',
    r"image cannot be": b'{"image": 1e308, "text": "a"}',
    r"messages must be a list": b'{"messages": {"role": "user"}}',
    r"message 0: its role is": b'{"messages": [{"role": ["user"], "content": "a"}]}',
    r"5000 segments": json.dumps({"segments": [{"text": "a"}] * 5000}).encode(),
}  # fmt: skip
"""Reason -> a line with it."""

_CUT = picture()[:60]
BAD_ROWS = {
    r"an image cannot be decoded \(.*: give a whole file": {"bytes": _CUT, "path": "a.png"},
    r"an image cannot be decoded \(it is damaged": {"bytes": b"GIF89a", "path": None},
    r"9000 x 9000": {"bytes": bomb(), "path": None},
    r"lies outside": {"bytes": None, "path": "../b.png"},
    r"is missing": {"bytes": None, "path": "gone.png"},
    r"of no known shape|an image cannot be": {"bytes": None, "path": None},
}
BAD_SAMPLES = {
    r"cannot be read \(it is not JSON \(Expecting": {"json": b'{"image": '},
    r"cannot be read \(its JSON is nested": {"json": b"[" * 100_000},
    r"cannot be decoded": {"png": _CUT, "txt": b"a"},
    r"'.*\.txt' cannot be read": {"png": picture(), "txt": b"\xff"},
    r"is not in its sample": {"json": b'{"image": "../../etc/passwd", "text": "a"}'},
    r"of no known shape": {"pkl": b"cos\nsystem\n(S'touch pickled'\ntR."},
    r"5000000 bytes, and at most 4194304": {"txt": b" " * 5_000_000},
}


def write_hostile(folder):
    """10,000 good records and 1,000 bad ones in three sources: of each its config, and the reasons in order."""
    rng = np.random.default_rng(0)
    sources = {}

    def order(good, bad, reasons):
        chosen = ["good"] * good + [list(reasons)[i % len(reasons)] for i in range(bad)]
        return [chosen[i] for i in rng.permutation(good + bad)]

    lines = order(6000, 540, BAD_LINES)
    with (folder / "a.jsonl").open("wb") as file:
        for reason in lines:
            file.write(BAD_LINES.get(reason, b'{"text": "good"}') + b"\n" * int(rng.integers(1, 3)))
    (folder / "a.json").write_text("{}")
    sources["lines"] = {"path": "a.jsonl"}, lines
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = order(2000, 240, BAD_ROWS)
    good = {"bytes": picture(), "path": "a.png"}
    table = arrow.Table.from_pylist([{"image": BAD_ROWS.get(reason, good), "text": "good"} for reason in rows])
    parquet.write_table(table, folder / "b.parquet", row_group_size=100)
    sources["rows"] = {"path": "b.parquet", "kind": "parquet"}, rows
    samples = order(2000, 220, BAD_SAMPLES)
    with tarfile.open(folder / "c.tar", "w") as tar:
        for number, reason in enumerate(samples):
            for field, content in BAD_SAMPLES.get(reason, {"png": picture(), "txt": b"good"}).items():
                member = tarfile.TarInfo(f"{number:05}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    sources["samples"] = {"path": "c.tar", "kind": "webdataset"}, samples
    return sources


def peak_bytes():
    """The most memory that this process had since it was last asked."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(line.split()[1])


def test_a_thousand_bad_records_among_ten_thousand(tmp_path, tokenizer, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources, encode = write_hostile(tmp_path), Encoder(tokenizer, model.vision, 70)
    found = Counter()
    peak_bytes()
    before = peak_bytes()
    for name, (source, expected) in sources.items():
        documents = open_documents(SourceConfig(name, **source))
        assert len(documents) == len(expected)
        for i, reason in enumerate(expected):
            found[reason] += 1
            if reason == "good":
                tokens = encode(documents[i]).read().tokens
                assert tokenizer.decode(tokens[-5:].tolist()).endswith("good<eos>")
                continue
            with pytest.raises(InputError, match=reason) as caught:
                encode(documents[i]).read()
            assert len(str(caught.value)) < 700
    assert (found["good"], found.total()) == (10_000, 11_000)
    assert peak_bytes() - before < 2**28
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "a.json", "b.parquet", "c.tar"}
