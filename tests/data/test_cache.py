"""What is kept on disk of images and sounds is what would be made of them again, or it is made again."""

import contextlib
import errno
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.batch import FIELDS
from gemma4_jax.data import cache as module
from gemma4_jax.data.cache import Cache
from gemma4_jax.data.example import SizedImage, SizedSound
from gemma4_jax.data.iterator import read_counters
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.errors import InputError
from tests.data.test_sounds import chirp, encoded

LARGE = 2**40


def picture(seed, width=90):
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, width, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def image(content, budget=70):
    return SizedImage.of(content, patch_size=4, pooling_size=2, max_soft_tokens=budget, name="a.jpg")


def sound(content, **settings):
    return SizedSound.of(content, mel_bins=16, **settings)


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def never_decoded(monkeypatch):
    """A function after which nothing may be decoded."""

    def forbid():
        for name in ("read_patches", "read_samples"):
            monkeypatch.setattr(f"gemma4_jax.data.example.{name}", lambda *_, **__: pytest.fail("decoded"))

    return forbid


@pytest.fixture(scope="module")
def config(make_config, tmp_path_factory):
    """A function from changes of `data` to a run on photographs, some of which end too early."""
    folder = tmp_path_factory.mktemp("mine")
    for i in range(12):
        content = picture(i, 40 + 10 * i)
        (folder / f"{i}.jpg").write_bytes(content[: len(content) // 2] if i % 5 == 4 else content)
    lines = [json.dumps({"image": f"{i}.jpg", "caption": f"picture {i}"}) + "\n" for i in range(12)]
    (folder / "a.jsonl").write_text("".join(lines))

    def make(cache_dir="", **changes):
        return make_config(sources={"mine": {"path": str(folder / "a.jsonl")}}, cache_dir=str(cache_dir), **changes)

    return make


def batches_of(config, tokenizer):
    with contextlib.closing(make_train_iterator(config, tokenizer)) as batches:
        return [next(batches) for _ in range(8)], read_counters(batches)


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name), err_msg=name)


def test_a_run_reads_the_same_with_and_without(config, tokenizer, tmp_path, monkeypatch):
    batches, counters = batches_of(config(), tokenizer)
    filling, counters_filling = batches_of(config(tmp_path / "made" / "here"), tokenizer)
    assert len(entries(tmp_path)) == 10  # those that are whole
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "_write", lambda *_: pytest.fail("made again"))
        again, counters_again = batches_of(config(tmp_path / "made" / "here"), tokenizer)
    assert_same(batches, filling)
    assert_same(batches, again)
    assert counters == counters_filling == counters_again
    assert counters["mine"]["unreadable"] > 0


def test_workers_share_a_folder(config, tokenizer, tmp_path):
    batches, _ = batches_of(config(tmp_path, num_workers=2), tokenizer)
    assert len(entries(tmp_path)) == 10
    assert_same(batches, batches_of(config(), tokenizer)[0])


@pytest.mark.parametrize(
    "media",
    [
        [image(picture(0)), image(picture(1)), image(picture(0), budget=140)],
        [
            sound(encoded(chirp(2, 16_000))),
            sound(encoded(chirp(2, 16_000)), seconds=(0, 1)),
            sound(encoded(chirp(2, 16_000)), seconds=(1, 2)),
            sound(encoded(chirp(0.005, 16_000))),  # of no frame
        ],
    ],
    ids=["images", "sounds"],
)
def test_whatever_decides_of_it_makes_an_entry(media, tmp_path, never_decoded, monkeypatch):
    cache = Cache(tmp_path, LARGE)
    array = lambda read: getattr(read, "patches", read)  # noqa: E731
    expected = [array(medium.read()) for medium in media]
    for number, medium in enumerate(media, start=1):
        medium.read(cache)
        assert len(entries(tmp_path)) == number
    monkeypatch.setattr(module, "_version", lambda library: "another")
    media[0].read(cache)
    assert len(entries(tmp_path)) == len(media) + 1
    monkeypatch.undo()
    never_decoded()
    for medium, made in zip(media, expected, strict=True):
        again = array(medium.read(cache))
        np.testing.assert_array_equal(again, made)
        assert again.dtype == made.dtype


def flipped(content, _):
    place = len(content) // 3
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def pages_exchanged(content, _):
    return content[4096:8192] + content[:4096] + content[8192:]


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        pages_exchanged,
        lambda content, _: content[:-1],
        lambda content, _: content + b"\0",
        lambda content, _: b"",
        lambda content, _: bytes(len(content)),
        lambda content, _: content[:-4096] + bytes(4096),
        lambda content, _: bytes([content[0] ^ 1]) + content[1:],
        lambda content, _: content[:-1] + bytes([content[-1] ^ 1]),
        lambda _, other: other,
    ],
)
def test_a_damaged_entry_is_made_again(damage, tmp_path, caplog, never_decoded):
    cache, one, other = Cache(tmp_path, LARGE), image(picture(0)), image(picture(1))
    expected = one.read(cache).patches
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    other.read(cache)
    (of_other,) = set(entries(tmp_path)) - {path}
    path.write_bytes(damage(whole, of_other.read_bytes()))
    for _ in range(2):
        np.testing.assert_array_equal(one.read(cache).patches, expected)
    assert path.read_bytes() == whole
    assert caplog.text.count("is damaged") == 1
    never_decoded()
    one.read(cache)


def test_what_cannot_be_decoded_is_not_kept(tmp_path):
    with pytest.raises(InputError, match=r"^a\.jpg: an image cannot be decoded"):
        image(picture(0)[:-500]).read(Cache(tmp_path, LARGE))
    assert entries(tmp_path) == []


def test_many_may_make_the_same_entry_at_once(tmp_path):
    content = picture(0)
    caches = [pickle.loads(pickle.dumps(Cache(tmp_path, LARGE, 4))) for _ in range(4)]  # as other processes have them
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda i: image(content).read(caches[i % 4]).patches, range(40)))
    assert len(entries(tmp_path)) == 1
    for patches in read:
        np.testing.assert_array_equal(patches, read[0])


def test_a_full_folder_is_read_and_not_added_to(tmp_path, caplog, never_decoded):
    images = [image(picture(i)) for i in range(10)]
    size = images[0].read().patches.nbytes + 4
    limit = 4 * size + size // 2
    caches = [Cache(tmp_path, limit, 2) for _ in range(2)]
    for i, one in enumerate(images):
        one.read(caches[i % 2])
    kept = sum(path.stat().st_size for path in entries(tmp_path))
    assert limit - 2 * size < kept <= limit
    assert caplog.text.count(f"nothing is added to {tmp_path} any more: it has data.cache_bytes={limit}") == 2
    never_decoded()
    images[0].read(caches[1])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_said_once(code, tmp_path, caplog, monkeypatch):
    def write(*_, **__):
        raise OSError(code, "no")

    monkeypatch.setattr(module, "write_atomically", write)
    cache = Cache(tmp_path, LARGE)
    for i in range(3):
        np.testing.assert_array_equal(image(picture(i)).read(cache).patches, image(picture(i)).read().patches)
    assert caplog.text.count(f"nothing is added to {tmp_path} any more: no.") == 1


def test_a_disk_with_little_room_is_left_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "MIN_FREE_BYTES", LARGE**2)
    image(picture(0)).read(Cache(tmp_path, LARGE))
    assert entries(tmp_path) == []
    assert "bytes of its disk are free" in caplog.text


def test_a_folder_may_be_deleted_while_it_is_used(tmp_path, caplog):
    folder = tmp_path / "cache"
    folder.mkdir()
    cache = Cache(folder, LARGE)
    folder.rmdir()
    image(picture(0)).read(cache)
    assert "any more: No such file or directory" in caplog.text


@pytest.mark.parametrize(
    ("place", "match"),
    [("a.txt", r"data\.cache_dir='.*a\.txt' cannot be a folder: File exists"), ("a.txt/b", "Not a directory")],
)
def test_a_folder_that_cannot_be_made_is_refused_at_once(place, match, config, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=match):
        make_train_iterator(config(tmp_path / place), tokenizer)
    with pytest.raises(InputError, match="mount a bucket"):
        config("gs://bucket/cache")
