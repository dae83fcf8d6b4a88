import numpy as np
import pytest

from gemma4_jax.data.images import resize_image
from gemma4_jax.data.sources.digits import PLACES, QUESTIONS, SCAN, SHEETS, DigitsSource, compose, load_scans, vary


def images_of(record):
    return [segment["image"] for segment in record["segments"] if "image" in segment]


def test_every_scan_is_on_one_side_of_the_split():
    train, train_labels = load_scans("train")
    held_out, held_out_labels = load_scans("held_out")
    assert len(train) + len(held_out) == 1797
    assert 430 <= len(held_out) <= 460
    assert set(train_labels) == set(held_out_labels) == set(range(10))
    assert {scan.tobytes() for scan in train}.isdisjoint(scan.tobytes() for scan in held_out)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_source_draws_from_its_own_side_only(split):
    source = DigitsSource(split, seed=0)
    for given, expected in zip((source._scans, source._labels), load_scans(split), strict=True):
        np.testing.assert_array_equal(given, expected)


def test_variants_look_like_their_scan():
    rng, (scans, _) = np.random.default_rng(0), load_scans("train")
    variants = np.stack([vary(rng, scan) for scan in scans])
    assert (variants.min(), variants.max()) == (0, 1)
    flat = (array.reshape(len(scans), -1) for array in (scans, variants))
    similarity = [np.corrcoef(*pair)[0, 1] for pair in zip(*flat, strict=True)]
    assert np.mean(similarity) > 0.85
    assert max(similarity) < 1


def test_a_document_depends_on_split_seed_and_index_alone():
    def fingerprint(source, index):
        return [s["text"] if "text" in s else s["image"].tobytes() for s in source[index]["segments"]]

    source = DigitsSource("train", seed=3)
    fingerprint(source, 5)
    assert fingerprint(source, 9) == fingerprint(DigitsSource("train", seed=3), 9)
    assert fingerprint(source, 9) != fingerprint(source, 10)
    assert fingerprint(source, 9) != fingerprint(DigitsSource("train", seed=4), 9)


@pytest.mark.parametrize(("split", "most_images"), [("train", 4), ("held_out", 1)])
def test_documents_ask_and_answer(split, most_images):
    source = DigitsSource(split, seed=0)
    counts, lengths = set(), set()
    for index in range(400):
        segments = source[index]["segments"]
        assert len(segments) % 3 == 0
        counts.add(len(segments) // 3)
        for question, image, answer in zip(segments[::3], segments[1::3], segments[2::3], strict=True):
            assert image["image"].dtype == np.uint8
            assert question["text"] in QUESTIONS
            assert question["loss"] is False
            assert answer.keys() == {"text"}
            assert answer["text"][:-1].isdigit()
            assert answer["text"][-1] == "\n"
            lengths.add(len(answer["text"]) - 1)
    assert counts == set(range(1, most_images + 1))
    assert lengths == set(range(1, PLACES + 1))


def resized(pixels):
    return resize_image(pixels, patch_size=4, pooling_size=2, max_soft_tokens=70)


def test_a_digit_is_one_soft_token_of_the_last_line():
    (scans, _), worst = load_scans("held_out"), 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        chosen = scans[rng.integers(len(scans), size=rng.integers(1, PLACES + 1))]
        sheet = resized(compose(rng, chosen)).astype(float).mean(axis=-1)
        paper = sheet[0, 0]
        ink = (sheet - paper) / (sheet.max() - paper)
        assert np.all(np.abs(ink[: -SCAN - 1]) < 0.02)
        line = ink[-SCAN:]
        first = line.shape[1] - SCAN * PLACES
        assert np.all(np.abs(line[:, : max(first - 2, 0)]) < 0.02)
        number = line[:, first : first + SCAN * len(chosen)]
        # Two resizes, of which the second may change a percent: the largest measured difference is 0.034.
        assert np.all(np.abs(line[:, first + number.shape[1] + 2 :]) < 0.02)
        worst = max(worst, np.abs(number - np.concatenate(chosen, axis=1)).mean())
    assert worst < 0.1


def test_sheets_have_many_shapes_and_their_shape_tells_nothing():
    source = DigitsSource("held_out", seed=0)
    lengths, ratios, grids = [], [], set()
    for index in range(2000):
        (image,) = images_of(source[index])
        height, width = image.shape[:2]
        rows, columns = (side // SCAN for side in resized(image).shape[:2])
        grids.add((rows, columns))
        ratios.append(width / height)
        lengths.append(len(source[index]["segments"][2]["text"]))
    assert grids == {(lines, columns) for lines, columns, _ in SHEETS}
    assert min(ratios) < 1
    assert max(ratios) > 20
    assert abs(np.corrcoef(np.log(ratios), lengths)[0, 1]) < 0.1
