"""Every form in which an image may come: what becomes of it here, and beside the reference (docs/images.md)."""

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gemma4_jax import sizes
from gemma4_jax.data.document import Image
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.image_sizes import upright_size
from gemma4_jax.data.images import read_pixels
from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import Tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "images.md"

HEIGHT, WIDTH = 6, 8
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
INK = np.indices((HEIGHT, WIDTH)).sum(axis=0) % 3 == 0
"""Where something is drawn; elsewhere a picture with transparency is transparent, and black underneath."""

DEEP = RNG.integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
ALPHA = np.where(INK, 255, 0).astype(np.uint8)
HALF = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
GLYPH = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
ON_WHITE = np.repeat(np.where(INK, 0, 255)[..., None], 3, axis=-1)
"""A black glyph on transparent, over white."""

PALETTE = RNG.integers(0, 256, 768, dtype=np.uint8)
PALETTE[:6] = 0


def file_of(picture: PIL.Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def png_of(rows: np.ndarray, color_type: int, transparent: bytes = b"") -> bytes:
    """A PNG of 16 bits, which Pillow does not write: color_type 0 gray, 2 RGB, 4 gray and alpha, 6 RGB and alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    keys = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + keys + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def palette_picture() -> PIL.Image.Image:
    picture = PIL.Image.fromarray(np.where(INK, 1, 0).astype(np.uint8)).convert("P")
    picture.putdata(np.where(INK, 1, 0).ravel().tolist())
    picture.putpalette(PALETTE.tolist())
    return picture


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colours.reshape(HEIGHT, WIDTH, -1) * share + 255 * (1 - share)) * np.ones(3)


def turned() -> dict:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    return {"exif": exif}


def gray_as_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=-1)


@dataclasses.dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
      data: of the file.
      says: what becomes of it, for the table.
      expected: its pixels; None if it is refused.
      tolerance: levels of 255, where the format is lossy.
    """

    data: bytes
    says: str
    expected: np.ndarray | None
    tolerance: int = 0


def with_alpha(colours: np.ndarray, alpha: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.dstack([colours, alpha]))


rgb = PIL.Image.fromarray(RGB)
glyph = with_alpha(GLYPH, ALPHA)
keyed = GLYPH.copy()
keyed[~INK] = 9
key_value = int(DEEP[0, 0, 0])
deep_gray = np.where(DEEP[..., 0] == key_value, 255, DEEP[..., 0] >> 8)

FORMS = {
    "PNG, RGB": Form(file_of(rgb, "PNG"), "as it is", RGB),
    "PNG, gray": Form(file_of(PIL.Image.fromarray(GRAY), "PNG"), "gray", gray_as_rgb(GRAY)),
    "PNG, 1 bit": Form(file_of(PIL.Image.fromarray(INK), "PNG"), "black and white", gray_as_rgb(INK * 255)),
    "PNG, RGB with alpha": Form(file_of(glyph, "PNG"), "over white", ON_WHITE),
    "PNG, RGB half transparent": Form(file_of(with_alpha(RGB, HALF), "PNG"), "over white", over_white(RGB, HALF), 1),
    "PNG, gray with alpha": Form(file_of(with_alpha(GRAY, HALF), "PNG"), "over white", over_white(GRAY, HALF), 1),
    "PNG, a transparent colour of a palette": Form(
        file_of(palette_picture(), "PNG", transparency=0), "over white", ON_WHITE
    ),
    "PNG, a palette with alpha": Form(
        file_of(palette_picture(), "PNG", transparency=b"\0\xff"), "over white", ON_WHITE
    ),
    "PNG, a transparent RGB colour": Form(
        file_of(PIL.Image.fromarray(keyed), "PNG", transparency=(9, 9, 9)), "over white", ON_WHITE
    ),
    "PNG, a transparent gray": Form(
        file_of(PIL.Image.fromarray(keyed[..., 0]), "PNG", transparency=9), "over white", ON_WHITE
    ),
    "PNG, gray of 16 bits": Form(png_of(DEEP[..., 0], 0), "high byte", gray_as_rgb(DEEP[..., 0] >> 8)),
    "PNG, gray of 16 bits, one transparent": Form(
        png_of(DEEP[..., 0], 0, struct.pack(">H", key_value)), "high byte, over white", gray_as_rgb(deep_gray)
    ),
    "PNG, gray of 16 bits with alpha": Form(
        png_of(DEEP[..., :2], 4), "high byte, over white", over_white(DEEP[..., 0] >> 8, DEEP[..., 1] >> 8), 1
    ),
    "PNG, RGB of 16 bits": Form(png_of(DEEP, 2), "high byte", DEEP >> 8),
    "PNG, RGB of 16 bits, one transparent": Form(
        png_of(DEEP, 2, DEEP[0, 0].astype(">u2").tobytes()), "high byte, opaque", DEEP >> 8
    ),
    "PNG, turned by EXIF": Form(file_of(rgb, "PNG", **turned()), "upright", np.rot90(RGB, -1)),
    "PNG, animated (APNG)": Form(
        file_of(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)]), "first picture", RGB
    ),
    "PNG, animated, with a picture that is no part of it": Form(
        file_of(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)] * 2, default_image=True),
        "that picture",
        RGB,
    ),
    "WebP": Form(file_of(rgb, "WEBP", lossless=True), "as it is", RGB),
    "WebP with alpha": Form(file_of(glyph, "WEBP", lossless=True), "over white", ON_WHITE),
    "WebP, animated": Form(
        file_of(rgb, "WEBP", lossless=True, save_all=True, append_images=[rgb.rotate(180)]), "first picture", RGB
    ),
    "AVIF": Form(file_of(rgb, "AVIF", quality=100, subsampling="4:4:4"), "as it is", RGB, 3),
    "AVIF, animated": Form(
        file_of(rgb, "AVIF", quality=100, subsampling="4:4:4", save_all=True, append_images=[rgb.rotate(180)]),
        "first picture",
        RGB,
        3,
    ),
    "AVIF with alpha": Form(file_of(glyph, "AVIF", quality=100), "over white", ON_WHITE, 3),
    "AVIF, turned": Form(
        file_of(rgb, "AVIF", quality=100, subsampling="4:4:4", **turned()), "upright", np.rot90(RGB, -1), 3
    ),
    "GIF": Form(file_of(palette_picture(), "GIF"), "as it is", PALETTE[:6].reshape(2, 3)[INK.astype(int)]),
    "GIF, transparent": Form(file_of(palette_picture(), "GIF", transparency=0), "over white", ON_WHITE),
    "GIF, animated and transparent": Form(
        file_of(palette_picture(), "GIF", transparency=0, save_all=True, append_images=[rgb.convert("P")]),
        "first picture, over white",
        ON_WHITE,
    ),
    "JPEG": Form(file_of(rgb, "JPEG", quality=100, subsampling=0), "as it is", RGB, 3),
    "JPEG, turned by EXIF": Form(
        file_of(rgb, "JPEG", quality=100, subsampling=0, **turned()), "upright", np.rot90(RGB, -1), 3
    ),
    "JPEG, CMYK": Form(
        file_of(rgb.convert("CMYK"), "JPEG", quality=100, subsampling=0), "RGB, without a colour profile", RGB, 4
    ),
    "JPEG of several pictures (MPO)": Form(
        file_of(rgb, "MPO", quality=100, subsampling=0, save_all=True, append_images=[rgb.rotate(180)]),
        "first picture",
        RGB,
        3,
    ),
    "BMP": Form(file_of(rgb, "BMP"), "as it is", RGB),
    "TIFF": Form(file_of(rgb, "TIFF"), "as it is", RGB),
    "TIFF of several pages": Form(
        file_of(rgb, "TIFF", save_all=True, append_images=[rgb.resize((90, 20))]), "first page", RGB
    ),
    "TIFF with alpha": Form(file_of(glyph, "TIFF"), "over white", ON_WHITE),
    "TIFF, gray of 16 bits": Form(
        file_of(PIL.Image.fromarray(DEEP[..., 0]), "TIFF"), "high byte", gray_as_rgb(DEEP[..., 0] >> 8)
    ),
    "TIFF, whole numbers of 32 bits": Form(
        file_of(PIL.Image.fromarray(DEEP[..., 0].astype(np.int32)), "TIFF"), "refused", None
    ),
    "TIFF, floats": Form(file_of(PIL.Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF"), "refused", None),
}


@pytest.mark.parametrize("name", FORMS)
def test_pixels_of_every_form(name, tmp_path):
    """By the bytes of a file and by Pillow's image of it alike."""
    form = FORMS[name]
    if form.expected is None:
        for given in (form.data, PIL.Image.open(io.BytesIO(form.data))):
            with pytest.raises(InputError, match="nothing says what is white: store it with 8 or 16 bits"):
                read_pixels(given)
        return
    pixels = read_pixels(form.data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == form.expected.shape
    assert np.abs(pixels - form.expected.astype(float)).max() <= form.tolerance
    np.testing.assert_array_equal(read_pixels(PIL.Image.open(io.BytesIO(form.data))), pixels)


@pytest.mark.parametrize("name", FORMS)
def test_the_size_of_every_form(name, monkeypatch):
    """Of JPEG, WebP and most PNG by the header alone."""
    form = FORMS[name]
    if form.expected is not None:
        assert upright_size(form.data) == form.expected.shape[:2]
    if name.startswith(("JPEG", "WebP")) or name == "PNG, RGB":
        monkeypatch.setattr("gemma4_jax.data.image_sizes.read_pixels", lambda image: pytest.fail("decoded"))
        assert upright_size(form.data) == form.expected.shape[:2]


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_picture_that_is_turned(file_format, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = file_of(rgb, file_format, exif=exif)
    assert upright_size(data) == read_pixels(data).shape[:2]
    if file_format == "PNG":  # the chunk may stand behind the pixels as well
        start = data.index(b"eXIf") - 4
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        end = data.index(b"IEND") - 4
        moved = data[:start] + data[stop:end] + data[start:stop] + data[end:]
        assert upright_size(moved) == read_pixels(moved).shape[:2] == read_pixels(data).shape[:2]


def test_a_size_that_cannot_be_told_is_the_sentence_of_the_pixels():
    for data in (b"", b"<html>", FORMS["TIFF, floats"].data):
        with pytest.raises(InputError, match="an image"):
            upright_size(data)


ARRAYS = {
    "RGB": (RGB, RGB, 0),
    "gray": (GRAY, gray_as_rgb(GRAY), 0),
    "gray in one channel": (GRAY[..., None], gray_as_rgb(GRAY), 0),
    "gray and alpha": (np.dstack([GRAY, HALF]), over_white(GRAY, HALF), 1),
    "RGB and alpha": (np.dstack([RGB, HALF]), over_white(RGB, HALF), 1),
    "16 bits": (DEEP[..., 0], gray_as_rgb(DEEP[..., 0] >> 8), 0),
    "1 bit": (INK, gray_as_rgb(INK * 255), 0),
    "one pixel": (RGB[:1, :1], RGB[:1, :1], 0),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_pixels_of_arrays(name):
    given, expected, tolerance = ARRAYS[name]
    pixels = read_pixels(given)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected.astype(float)).max() <= tolerance


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.float64), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.int64),
        np.zeros((4, 4, 5), np.uint8), np.zeros((4, 4, 3), np.uint16), np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8), np.zeros((4, 4, 0), np.uint8),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)  # fmt: skip
def test_other_arrays_are_refused(array):
    with pytest.raises(InputError, match=rf"an image cannot be {array.dtype} \[.*: give uint8 pixels"):
        read_pixels(array)


def test_a_pillow_image_is_left_as_it_is():
    picture = PIL.Image.open(io.BytesIO(FORMS["PNG, turned by EXIF"].data))
    read_pixels(picture)
    assert picture.size == (WIDTH, HEIGHT)
    assert picture.getexif()[0x0112] == 6


def test_an_error_names_the_file_and_no_object():
    encoder = Encoder(Tokenizer.load("bundled"), sizes.quickstart().vision, 70)
    broken = {b"<html>": "it is damaged or of another format", FORMS["PNG, RGB"].data[:-40]: "image file is truncated"}
    for data, reason in broken.items():
        with pytest.raises(InputError, match=f"^cat.png: an image cannot be decoded .{reason}") as error:
            encoder.size_image(Image(data, name="cat.png")).read()
        assert "0x" not in str(error.value)
    with pytest.raises(InputError, match=r"^cat.png: max_soft_tokens=0 of an image must be one of 70\."):
        encoder.size_image(Image(RGB, 0, "cat.png"))


@pytest.mark.parametrize("name", FORMS)
def test_too_many_pixels_are_refused_before_any_is_decoded(name, monkeypatch):
    monkeypatch.setattr("gemma4_jax.data.images.MAX_PIXELS", HEIGHT * WIDTH - 1)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for given in (FORMS[name].data, PIL.Image.open(io.BytesIO(FORMS[name].data))):
        with pytest.raises(InputError, match="8 pixels is refused: at most 47 are read"):
            read_pixels(given)


def test_a_build_of_pillow_without_a_format_says_so(monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: name != "avif")
    with pytest.raises(InputError, match="PNG, JPEG, WEBP, GIF, BMP, TIFF; for AVIF install a wheel of Pillow"):
        read_pixels(b"")


def beside_the_reference() -> str:
    """The table of docs/images.md."""
    processing = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    from transformers.image_utils import load_image

    process = processing.Gemma4ImageProcessorPil().process_image

    def compare(form: Form, given: PIL.Image.Image) -> str:
        theirs = process(given, do_convert_rgb=True).transpose(1, 2, 0)
        if form.expected is not None and theirs.shape != form.expected.shape:
            return "not turned"
        if form.expected is not None and np.array_equal(theirs, read_pixels(form.data)):
            return "the same"
        clipped = np.asarray(PIL.Image.open(io.BytesIO(form.data))).clip(0, 255)
        if clipped.ndim == 2 and np.array_equal(theirs, gray_as_rgb(clipped.astype(np.uint8))):
            return "clipped to 255"
        return "other pixels"

    rows = []
    for name, form in FORMS.items():
        opened = PIL.Image.open(io.BytesIO(form.data))
        loaded = load_image(PIL.Image.open(io.BytesIO(form.data)))  # what it makes of a path
        rows.append(f"| {name} | {form.says} | {compare(form, opened)} | {compare(form, loaded)} |\n")
    return "".join(rows)


def test_the_table_in_the_docs_is_true():
    pytest.importorskip("torch")
    table = beside_the_reference()
    assert table in DOCS.read_text("utf-8"), f"docs/images.md must hold\n{table}"
