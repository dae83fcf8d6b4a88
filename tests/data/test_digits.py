import numpy as np
import pytest

from gemma4_jax.data.document import Image, Text
from gemma4_jax.data.sources.digits import QUESTIONS, SCAN, DigitsSource, compose, load_scans
from gemma4_jax.vision.geometry import resized_size


def images_of(document):
    return [segment.content for segment in document.segments if isinstance(segment, Image)]


def test_every_scan_is_on_one_side_of_the_split():
    train, train_labels = load_scans("train")
    held_out, held_out_labels = load_scans("held_out")
    assert len(train) + len(held_out) == 1797
    assert 430 <= len(held_out) <= 460
    assert set(train_labels) == set(held_out_labels) == set(range(10))
    assert {scan.tobytes() for scan in train}.isdisjoint(scan.tobytes() for scan in held_out)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_source_draws_from_its_own_side_only(split):
    # Variants of training scans are made from training scans, so the first variant is the scans themselves.
    source, (scans, labels) = DigitsSource(split, seed=0), load_scans(split)
    np.testing.assert_allclose(source._scans[: len(scans)], scans)
    np.testing.assert_array_equal(source._labels, np.tile(labels, len(source._labels) // len(labels)))
    assert len(source._scans) == len(scans) * (16 if split == "train" else 1)


def test_variants_look_like_their_scan():
    source, (scans, _) = DigitsSource("train", seed=0), load_scans("train")
    for variant in source._scans.reshape(-1, len(scans), SCAN * SCAN)[1:]:
        similarity = [np.corrcoef(a, b)[0, 1] for a, b in zip(variant, scans.reshape(len(scans), -1), strict=True)]
        assert np.mean(similarity) > 0.85


def test_a_document_depends_on_split_seed_and_index_alone():
    def fingerprint(source, index):
        return [s.text if isinstance(s, Text) else s.content.tobytes() for s in source[index].segments]

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
        segments = source[index].segments
        assert len(segments) % 3 == 0
        counts.add(len(segments) // 3)
        for image, question, answer in zip(segments[::3], segments[1::3], segments[2::3], strict=True):
            assert image.content.dtype == np.uint8
            assert question.text in QUESTIONS
            assert not question.loss
            assert answer.loss
            assert answer.text[:-1].isdigit()
            assert answer.text[-1] == "\n"
            lengths.add(len(answer.text) - 1)
    assert counts == set(range(1, most_images + 1))
    assert lengths == set(range(1, 7))


def test_a_canvas_shows_its_scans_in_order():
    scans, _ = load_scans("held_out")
    for seed in range(50):
        rng = np.random.default_rng(seed)
        chosen = scans[rng.integers(len(scans), size=rng.integers(1, 7))]
        canvas = compose(rng, chosen).astype(float).mean(axis=-1)
        ink = (canvas - canvas.min()) / (canvas.max() - canvas.min())
        x = -SCAN
        for scan in chosen:
            corners = [(x, y) for x in range(x + SCAN, ink.shape[1] - SCAN + 1) for y in range(ink.shape[0] - SCAN + 1)]
            errors = [np.abs(ink[y : y + SCAN, x : x + SCAN] - scan).mean() for x, y in corners]
            assert min(errors) < 0.05
            x = corners[int(np.argmin(errors))][0]


def test_digits_are_about_as_large_whatever_their_number():
    source = DigitsSource("held_out", seed=0)
    sizes, ratios = [], []
    for index in range(300):
        height, width = images_of(source[index])[0].shape[:2]
        resized = resized_size(height, width, patch_size=4, pooling_size=2, max_soft_tokens=70)
        sizes.append(SCAN * np.sqrt(resized[0] * resized[1] / (height * width)))
        ratios.append(width / height)
    assert max(sizes) < 1.5 * min(sizes)
    assert min(ratios) < 1
    assert max(ratios) > 4
