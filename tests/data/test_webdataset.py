"""Samples of tar files, read in place."""

import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.images import read_pixels
from gemma4_jax.data.sources import tar, webdataset
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def opened(path, **fields):
    return open_documents(SourceConfig("mine", kind="webdataset", path=str(path), **fields))


def png(pixels=PIXELS):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path, files, form=tarfile.PAX_FORMAT):
    """A tar of (name, bytes, text or what becomes JSON)."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            if not isinstance(content, bytes):
                content = (content if isinstance(content, str) else json.dumps(content)).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


LAION = {"url": "http://example.org/000000001.png", "caption": "a cat", "width": 9, "status": "success"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_captions(tmp_path, form):
    files = [
        ("000000001.png", png()), ("000000001.txt", "a cat"), ("000000001.json", LAION),
        ("000000002.JPG", png(PIXELS + 1)), ("000000002.txt", "ä dog"),
        ("deep/" + "x" * 90 + "/3.png", png(PIXELS + 2)), ("deep/" + "x" * 90 + "/3.json", LAION | {"caption": "3"}),
    ]  # fmt: skip
    path = write(tmp_path / "00042.tar", files, form)
    for task in ("auto", "caption"):
        documents = opened(path, task=task)
        assert documents[1].segments == (Image(png(PIXELS + 1), name="000000002.JPG"), Text("ä dog"))
        assert documents[0].name == "00042.tar sample 000000001"
    assert len(documents) == 3
    assert opened(path)[2].segments[1] == Text("3")
    np.testing.assert_array_equal(read_pixels(opened(path)[2].segments[0].content), PIXELS + 2)
    assert [path.name for path in tmp_path.iterdir()] == ["00042.tar"]  # nothing is unpacked


def test_a_key_ends_at_the_first_dot_of_the_name(tmp_path):
    files = [("a.b/22.05.png", png()), ("a.b/22.txt", "a"), ("a.c/22.png", png()), ("a.c/22.txt", "b")]
    source = webdataset.WebdatasetSource(str(write(tmp_path / "a.tar", files)))
    assert [source.name(i) for i in range(len(source))] == ["a.tar sample a.b/22", "a.tar sample a.c/22"]
    assert source[0] == {"image": {"bytes": png(), "path": "22.05.png"}, "text": "a"}


def test_other_files_are_bytes(tmp_path):
    files = [("1.cls", "3"), ("1.npy", b"\x93NUMPY"), ("1.pyd", pickle.dumps(3)), ("1.left.txt", "l"), ("1.json", [1])]
    source = webdataset.WebdatasetSource(str(write(tmp_path / "a.tar", files)))
    assert source[0] == {
        "cls": "3", "npy": b"\x93NUMPY", "pyd": pickle.dumps(3), "left.txt": "l", "json": [1],
    }  # fmt: skip


TALK = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Both."}]
PART = {"role": "user", "content": [{"type": "image", "image": "pictures/1.b.png"}, {"type": "text", "text": "?"}]}


@pytest.mark.parametrize(
    ("told", "images"),
    [
        ({"conversations": TALK}, ["1.a.png", "1.b.png"]),
        ({"conversations": TALK, "image": ["1.b.png", "x/1.a.png"]}, ["1.b.png", "1.a.png"]),
        ({"messages": [PART, {"role": "assistant", "content": "b"}], "also": "1.a.png"}, ["1.b.png"]),
    ],
)
def test_chats_have_their_images_in_the_sample(tmp_path, told, images):
    pixels = {"1.a.png": PIXELS, "1.b.png": PIXELS + 1}
    files = [*((name, png(given)) for name, given in pixels.items()), ("1.json", told)]
    document = opened(write(tmp_path / "a.tar", files))[0]
    assert [image.content for image in document.segments] == [png(pixels[name]) for name in images]
    assert document.conversation is not None


def test_several_tars_are_one_source(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.tar", [(f"{i}.txt", f"{name}{i}") for i in range(3)])
    (tmp_path / "c.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    documents = opened(f"{tmp_path}/*.tar")
    assert [documents[i].segments[0].text for i in range(9)] == ["a0", "a1", "a2", "b0", "b1", "b2", "a0", "a1", "a2"]
    assert documents[4].name == "b.tar sample 1"
    again = pickle.loads(pickle.dumps(documents))
    assert again[8] == Document((Text("a2"),), "c.tar sample 2")
    assert again.fingerprint() == documents.fingerprint()


def test_links_and_folders_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in {"0": tarfile.DIRTYPE, "1.png": tarfile.SYMTYPE, "1.jpg": tarfile.LNKTYPE}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        tar.add(write(tmp_path / "b", []), "._1.txt")
        for name in ("1.txt", "/etc/2.txt", "../../3.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"a"))
    source = webdataset.WebdatasetSource(str(tmp_path / "a.tar"))
    assert [source[i] for i in range(len(source))] == [{"text": "a"}] * 3  # names are only names


def test_a_path_does_not_lead_out_of_its_sample(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    for path in ("secret.png", "../secret.png", f"{tmp_path}/secret.png", "2.png", "http://example.org/1.png/x"):
        files = [("1.json", {"image": path, "text": "a"}), ("2.png", png()), ("2.txt", "b")]
        with pytest.raises(InputError, match=r"sample 1: the image .* is not in its sample"):
            opened(write(tmp_path / "a.tar", files))[0]


BAD_SAMPLES = {
    "it has two files 'txt'": [("1.txt", "a"), ("1.txt", "b")],
    r"'1\.json' cannot be read": [("1.json", b"{")],
    r"'1\.json' cannot be read \(its JSON is nested": [("1.json", b"[" * 100_000)],
    r"'1\.txt' cannot be read": [("1.txt", b"\xff")],
    r"'1\.json' has 5000000 bytes, and at most 4194304": [("1.json", b" " * 5_000_000)],
    "a sample of 1025 files is refused": [(f"1.{i}", b"") for i in range(1025)],
}


@pytest.mark.parametrize("message", BAD_SAMPLES)
def test_a_bad_sample_is_left_out_alone(tmp_path, message):
    documents = opened(write(tmp_path / "a.tar", [*BAD_SAMPLES[message], ("2.txt", "good")]))
    with pytest.raises(InputError, match=f"^a.tar sample 1: {message}"):
        documents[0]
    assert documents[1].segments == (Text("good"),)


def test_a_sample_has_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_SAMPLE_BYTES", 9)
    with pytest.raises(InputError, match="a sample of 10 bytes is refused: at most 9"):
        opened(write(tmp_path / "a.tar", [("1.txt", "a" * 10)]))[0]


def test_a_tar_that_is_none_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", [("1.txt", "a" * 2000), ("2.txt", "b"), ("1.png", png())])
    with pytest.raises(InputError, match=r"a\.tar has files of the sample '1' apart: sort it by name"):
        opened(path)
    path = write(tmp_path / "a.tar", [("1.txt", "a" * 2000), ("2.txt", "b" * 2000)])
    whole = path.read_bytes()
    for damaged in (whole[:1000], b"", b"x" * 2000, whole[:2560] + b"x" * 512 + whole[3072:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.tar cannot be read as a tar file \("):
            opened(path)
    path.write_bytes(whole)
    monkeypatch.setattr(webdataset, "MAX_FILES", 1)
    with pytest.raises(InputError, match="more than the 1 files"):
        opened(path)


@pytest.mark.parametrize("seed", range(30))
def test_headers_are_read_as_the_library_reads_them(tmp_path, seed):
    """Plain ones, which are read here, between others, and damaged ones."""
    rng = np.random.default_rng(seed)
    path, kinds = tmp_path / "a.tar", [tarfile.REGTYPE] * 9 + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, b"V"]
    formats = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
    with path.open("wb") as file:
        for i in range(30):
            member = tarfile.TarInfo("ä" * int(rng.integers(2)) + "x" * int(rng.choice([1, 1, 150])) + f"/{i}.a")
            member.type, member.size = kinds[rng.integers(len(kinds))], int(rng.integers(1100))
            if member.type != tarfile.REGTYPE:
                member.size = 0
            file.write(member.tobuf(formats[rng.integers(3)], "utf-8", "surrogateescape"))
            file.write(bytes(-(-member.size // 512) * 512))
        file.write(bytes(1024))
    if seed >= 15:
        content = bytearray(path.read_bytes())
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content[: rng.integers(len(content)) if seed >= 25 else None])

    def theirs():
        with tarfile.open(path, "r:") as opened:
            for member in opened:
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size

    try:
        found = list(tar.find_members(path, path))
    except InputError:
        assert seed >= 15  # one that is damaged, which the library takes for the end, or refuses as well
        return
    assert found == list(theirs())


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**33
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    with pytest.raises(InputError, match="a header of 8589934592 bytes"):
        opened(path)
