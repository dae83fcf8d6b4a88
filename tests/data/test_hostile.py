"""Bad and hostile records among good ones: every good one arrives, each bad one under its reason."""

import base64
import io
import json
import tarfile
from collections import Counter

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder, Unreadable
from gemma4_jax.data.mixture import Examples
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
    examples = Examples("mine", documents, encode)
    return [examples[i] for i in range(len(documents))]


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
