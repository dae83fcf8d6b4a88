import contextlib
import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.images import MAX_PIXELS, cut_patches, join_patches, read_patches, read_pixels, resize_image
from gemma4_jax.errors import InputError


def encoded(pixels, file_format="PNG", **options):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def random_pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_that_claims(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_a_file_gives_its_pixels(file_format):
    pixels = random_pixels(7, 5)
    options = {"lossless": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(read_pixels(encoded(pixels, file_format, **options)), pixels)


def test_an_image_is_turned_upright():
    pixels = random_pixels(6, 4)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    np.testing.assert_array_equal(read_pixels(encoded(pixels, exif=exif)), np.rot90(pixels, -1))


HOSTILE = {
    "nothing": b"",
    "not an image": b"<html>404</html>",
    "truncated": encoded(random_pixels(64, 64))[:-3000],
    "cut header": encoded(random_pixels(64, 64))[:20],
    "decompression bomb": png_that_claims(60000, 60000),
    "more pixels than allowed": png_that_claims(MAX_PIXELS // 1000 + 1, 1000),
    "no pixels": png_that_claims(0, 10),
    "a format that is not on the list": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_in_one_sentence(name):
    with pytest.raises(InputError) as error:
        read_pixels(HOSTILE[name])
    assert "\n" not in str(error.value)


def test_too_many_pixels_are_refused_by_their_number():
    with pytest.raises(InputError, match=f"1000 x 67109 pixels is refused: at most {MAX_PIXELS}"):
        read_pixels(HOSTILE["more pixels than allowed"])


def test_a_damaged_file_never_escapes_as_another_error():
    whole = bytearray(encoded(random_pixels(16, 16), "JPEG"))
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = whole.copy()
        for place in rng.integers(0, len(whole), 5):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(InputError):
            assert read_pixels(bytes(damaged)).ndim == 3


@pytest.mark.parametrize(("patch_size", "pooling_size"), [(4, 2), (16, 3), (2, 1)])
def test_patches_lie_cell_by_cell(patch_size, pooling_size):
    p, k = patch_size, pooling_size
    rows, columns = 2, 3
    pixels = random_pixels(rows * p * k, columns * p * k)
    image = cut_patches(pixels, patch_size=p, pooling_size=k)
    assert image.num_soft_tokens == rows * columns
    n = 0
    for cell_y in range(rows):
        for cell_x in range(columns):
            for y in range(cell_y * k, cell_y * k + k):
                for x in range(cell_x * k, cell_x * k + k):
                    assert image.positions[n].tolist() == [x, y]
                    patch = pixels[y * p : (y + 1) * p, x * p : (x + 1) * p]
                    np.testing.assert_array_equal(image.patches[n], patch.ravel())
                    n += 1
    assert n == len(image.patches)
    order = np.random.default_rng(0).permutation(n)
    joined = join_patches(image.patches[order], image.positions[order], patch_size=p)
    np.testing.assert_array_equal(joined, pixels)


def test_pixels_are_those_of_the_reference_processor():
    transformers = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    rng = np.random.default_rng(0)
    for seed, (patch_size, pooling_size, budget) in enumerate([(16, 3, 70), (16, 3, 280), (4, 2, 70), (4, 2, 140)]):
        height, width = rng.integers(5, 400, 2)
        pixels = random_pixels(height, width, seed)
        processor = transformers.Gemma4ImageProcessorPil(
            patch_size=patch_size, pooling_kernel_size=pooling_size, max_soft_tokens=budget
        )
        theirs = processor(PIL.Image.fromarray(pixels), return_tensors="np")
        cells = {"patch_size": patch_size, "pooling_size": pooling_size}
        ours = cut_patches(resize_image(pixels, max_soft_tokens=budget, **cells), **cells)
        assert theirs["num_soft_tokens_per_image"][0] == ours.num_soft_tokens
        n = len(ours.patches)
        positions = theirs["image_position_ids"][0, :n]
        raster = np.lexsort((ours.positions[:, 0], ours.positions[:, 1]))
        np.testing.assert_array_equal(ours.positions[raster], positions)
        difference = np.abs(theirs["pixel_values"][0, :n] * 255 - ours.patches[raster])
        assert difference.max() <= 1  # levels of 255


@pytest.mark.parametrize(
    "given", [random_pixels(50, 71), encoded(random_pixels(50, 71), "JPEG"), random_pixels(70, 56)]
)
def test_patches_of_a_file_are_those_of_its_pixels(given):
    cells = {"patch_size": 4, "pooling_size": 2}
    expected = cut_patches(resize_image(read_pixels(given), max_soft_tokens=70, **cells), **cells)
    patches = read_patches(given, max_soft_tokens=70, **cells)
    np.testing.assert_array_equal(patches.patches, expected.patches)
    np.testing.assert_array_equal(patches.positions, expected.positions)
    assert patches.num_soft_tokens == expected.num_soft_tokens
