import numpy as np
import pytest

from gemma4_jax.data.assemble import assemble, packing_stats
from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.images import join_patches, resize_image
from gemma4_jax.data.pack import RowShape

CELLS = {"patch_size": 4, "pooling_size": 2}


def pixels(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Two rows; images of different shapes, more than one to a document, and a document without any.
DOCUMENTS = [
    [
        Document((Image(pixels(30, 50, 0)), Text("a? ", loss=False), Text("12\n"), Image(pixels(9, 90, 1))), "0 0"),
        Document((Text("import os\n"),), "0 1"),
        Document((Text("look ", loss=False), Image(pixels(64, 64, 2)), Text("x")), "0 2"),
    ],
    [Document((Image(pixels(80, 20, 3)), Text("yes")), "1 0")],
]


@pytest.fixture(scope="module")
def examples(tokenizer, model):
    encode = Encoder(tokenizer, model.vision, 70)
    return [[encode(document).read() for document in row] for row in DOCUMENTS]


@pytest.fixture(scope="module")
def batch(examples, tokenizer):
    return assemble([*examples, []], RowShape(352, 4, 1120, 48), tokenizer.tokens)


def test_rows_invert_to_the_documents(batch, examples, rows_of):
    for row, row_examples in zip(rows_of(batch), [*examples, []], strict=True):
        assert row.segment_ids.max() == len(row_examples)
        images = iter(range(1, 5))
        for segment, example in enumerate(row_examples, start=1):
            here = row.segment_ids == segment
            assert row.tokens[here].tolist() == example.tokens.tolist()
            assert row.positions[here].tolist() == list(range(len(example.tokens)))
            for image in example.images:
                mine = row.patch_image_ids == next(images)
                np.testing.assert_array_equal(row.patches[mine], image.patches)
                np.testing.assert_array_equal(row.patch_positions[mine], image.positions)
        assert np.all(row.segment_ids[np.flatnonzero(row.segment_ids == 0)[0] :] == 0)


def test_targets_follow_inside_the_document_and_weights_follow_the_loss_flags(batch, examples, rows_of):
    for row, row_examples in zip(rows_of(batch), examples, strict=False):
        for segment, example in enumerate(row_examples, start=1):
            here = row.segment_ids == segment
            assert row.targets[here].tolist() == [*example.tokens[1:].tolist(), 0]
            assert row.loss_weights[here].tolist() == [*example.carries_loss[1:].tolist(), 0]
        weighted_targets = row.targets[row.loss_weights > 0]
        assert not np.isin(weighted_targets, [0, 2, 7, 8, 9]).any()


@pytest.mark.parametrize(
    ("weighting", "weight"), [("token", lambda n: n), ("square_root", lambda n: n**0.5), ("document", lambda n: 1)]
)
def test_what_a_document_weighs(weighting, weight, examples, tokenizer, rows_of):
    batch = assemble(examples, RowShape(352, 4, 1120, 48), tokenizer.tokens, weighting=weighting)
    for row, row_examples in zip(rows_of(batch), examples, strict=True):
        for segment, example in enumerate(row_examples, start=1):
            weights = row.loss_weights[row.segment_ids == segment]
            assert weights.sum() == pytest.approx(weight(example.carries_loss[1:].sum()))
            assert len(set(weights[weights > 0])) == 1


def test_the_learned_text_is_the_text_with_loss(batch, rows_of, tokenizer):
    first, second, _ = rows_of(batch)
    assert tokenizer.decode(first.targets[first.loss_weights > 0].tolist()) == "12\n<eos>import os\n<eos>x<eos>"
    assert tokenizer.decode(second.targets[second.loss_weights > 0].tolist()) == "yes<eos>"


def test_placeholders_point_at_their_soft_tokens(batch, examples, rows_of):
    for row, row_examples in zip(rows_of(batch), examples, strict=False):
        images = [image for example in row_examples for image in example.images]
        placeholders = row.tokens == 8
        total = sum(image.num_soft_tokens for image in images)
        assert row.image_slots[placeholders].tolist() == list(range(total))
        assert np.all(row.image_slots[~placeholders] == -1)
        assert np.all(row.image_ids[~placeholders] == 0)
        # Soft token m is pooled from patches 4m..4m+3: they belong to the image of its placeholder, and to one cell.
        for position in np.flatnonzero(placeholders):
            cell = slice(4 * row.image_slots[position], 4 * row.image_slots[position] + 4)
            assert set(row.patch_image_ids[cell]) == {row.image_ids[position]}
            assert len({(x // 2, y // 2) for x, y in row.patch_positions[cell].tolist()}) == 1


def test_soft_tokens_are_in_raster_order(batch, rows_of):
    for row in rows_of(batch)[:2]:
        for image in range(1, row.image_ids.max() + 1):
            slots = row.image_slots[row.image_ids == image]
            cells = row.patch_positions[4 * slots] // 2
            assert cells.tolist() == sorted(cells.tolist(), key=lambda cell: (cell[1], cell[0]))


def test_images_are_the_resized_originals(batch, rows_of):
    for row, documents in zip(rows_of(batch), DOCUMENTS, strict=False):
        originals = [s.content for document in documents for s in document.segments if isinstance(s, Image)]
        for i, original in enumerate(originals):
            places = np.flatnonzero(row.patch_image_ids == i + 1)
            assert np.all(np.diff(places) == 1)
            shown = join_patches(row.patches[places], row.patch_positions[places], patch_size=4)
            np.testing.assert_array_equal(shown, resize_image(original, max_soft_tokens=70, **CELLS))
        assert row.patch_image_ids.max() == len(originals)


def test_padding_is_marked_everywhere(batch, rows_of):
    for row in rows_of(batch):
        unused = row.patch_image_ids == 0
        assert np.all(row.patch_positions[unused] == -1)
        assert np.all(row.patches[unused] == 0)
        padding = row.segment_ids == 0
        for leaf in (row.tokens, row.targets, row.loss_weights, row.positions, row.image_ids):
            assert np.all(leaf[padding] == 0)


def test_stats_say_how_full_it_is(batch, examples):
    stats = packing_stats(batch)
    tokens = sum(len(example.tokens) for row in examples for example in row)
    patches = sum(len(image.patches) for row in examples for example in row for image in example.images)
    assert stats == {
        "token_padding": pytest.approx(1 - tokens / (3 * 352)),
        "patch_padding": pytest.approx(1 - patches / (3 * 1120)),
        "documents": 4,
        "images": 4,
    }


def test_text_alone_needs_no_patches(tokenizer):
    example = Encoder(tokenizer, None, 70)(Document((Text("x = 1\n"),), "text")).read()
    batch = assemble([[example]], RowShape(16, 0, 0, 48), tokenizer.tokens)
    assert batch.patches.shape == (1, 0, 48)
    assert packing_stats(batch)["patch_padding"] == 0
