import dataclasses

import grain
import numpy as np
import pytest

from gemma4_jax.data.images import ImagePatches
from gemma4_jax.data.pack import LOOKAHEAD, MAX_UNUSABLE_RUN, PackIterDataset, RowShape, size_of
from gemma4_jax.data.tokenize import Example, Unreadable
from gemma4_jax.errors import InputError

SHAPE = RowShape(tokens=50, images=3, patches=80, patch_dim=12)


def text_example(length, name="text"):
    return Example(np.arange(length, dtype=np.int32), np.ones(length, bool), (), name)


def image_example(length, patches, name="image"):
    images = tuple(ImagePatches(np.zeros((n, 12), np.uint8), np.zeros((n, 2), np.int32), n // 4) for n in patches)
    return dataclasses.replace(text_example(length, name), images=images)


def packing(examples, shape=SHAPE):
    dataset = grain.MapDataset.source(examples).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    return iter(PackIterDataset(dataset, shape))


def random_examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        image_example(rng.integers(5, 50), 4 * rng.integers(1, 6, rng.integers(4)), name=f"document {i}")
        for i in range(n)
    ]


def test_every_example_is_packed_once_and_every_row_holds():
    examples = random_examples(200)
    rows = list(packing(examples))
    assert sorted(example.name for row in rows for example in row) == sorted(example.name for example in examples)
    for row in rows:
        tokens, images, patches = np.sum([size_of(example) for example in row], axis=0)
        assert tokens <= SHAPE.tokens
        assert images <= SHAPE.images
        assert patches <= SHAPE.patches


def test_rows_are_well_filled():
    rows = list(packing([text_example(int(n)) for n in np.random.default_rng(0).integers(5, 40, 1000)]))
    filled = np.mean([sum(len(example.tokens) for example in row) / SHAPE.tokens for row in rows[:-5]])
    assert filled > 0.97


def test_no_example_waits_for_more_rows_than_the_lookahead():
    examples = [text_example(30, "first"), text_example(25, "large")] + [
        text_example(20, f"small {i}") for i in range(200)
    ]
    rows = [[example.name for example in row] for row in packing(examples)]
    assert rows[0] == ["first", "small 0"]
    assert next(i for i, row in enumerate(rows) if "large" in row) < LOOKAHEAD


def test_long_text_is_split_into_whole_rows():
    iterator = packing([text_example(120, "long")])
    rows = list(iterator)
    pieces = [example for row in rows for example in row]
    assert [len(piece.tokens) for piece in pieces] == [50, 50, 20]
    assert np.concatenate([piece.tokens for piece in pieces]).tolist() == list(range(120))
    assert iterator.get_state()["counters"] == {"documents": 1, "images": 0, "split": 1, "dropped": 0, "unreadable": 0}


@pytest.mark.parametrize(
    "unfit",
    [image_example(51, [4]), image_example(10, [4] * 4), image_example(10, [40, 40, 4])],
)
def test_images_that_do_not_fit_are_dropped_and_counted(unfit):
    iterator = packing([unfit, image_example(10, [4, 4]), Unreadable("bad record")])
    rows = list(iterator)
    assert [[example.name for example in row] for row in rows] == [["image"]]
    assert iterator.get_state()["counters"] == {"documents": 1, "images": 2, "split": 0, "dropped": 1, "unreadable": 1}


def test_data_that_is_unusable_as_a_whole_is_an_error():
    assert len(list(packing([Unreadable("bad record")] * (MAX_UNUSABLE_RUN - 1)))) == 0
    with pytest.raises(InputError, match="bad record"):
        list(packing([Unreadable("bad record")] * MAX_UNUSABLE_RUN))
    with pytest.raises(InputError, match=r"image: 51 tokens.*data\.seq_len=50"):
        list(packing([image_example(51, [4])] * MAX_UNUSABLE_RUN))


def test_it_goes_on_from_any_row():
    examples = random_examples(60)
    for i in range(0, 60, 7):
        examples[i] = text_example(130, f"long {i}")
    examples[3] = Unreadable("bad record")
    iterator = packing(examples)
    states, rows = [iterator.get_state()], []
    for row in iterator:
        rows.append([(example.name, example.tokens.tolist()) for example in row])
        states.append(iterator.get_state())
    for start, state in enumerate(states):
        resumed = packing(examples)
        resumed.set_state(state)
        assert [[(example.name, example.tokens.tolist()) for example in row] for row in resumed] == rows[start:]
        assert resumed.get_state() == states[-1]


def test_data_that_changed_under_a_saved_run_is_refused():
    iterator = packing([text_example(40), text_example(120)])
    next(iterator)
    for changed in ([text_example(40), text_example(60)], [text_example(40), Unreadable("bad record")]):
        with pytest.raises(InputError, match="The data is not what it was"):
            packing(changed).set_state(iterator.get_state())


IMPOSSIBLE = {
    "seq_len=73 is shorter than one image": {"seq_len": 73},
    "seq_len=1 is not possible": {"seq_len": 1},
    "seq_len=4096 is not possible": {"seq_len": 4096},
    "patches_per_row=276 is not possible.*at least 280": {"patches_per_row": 276},
    "patches_per_row=1122 is not possible.*multiple of 4": {"patches_per_row": 1122},
    "soft_tokens_per_image=100 is not possible": {"soft_tokens_per_image": 100},
    "num_positions=512": {"soft_tokens_per_image": 280, "seq_len": 2048, "patches_per_row": 1120},
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_a_row_that_cannot_hold_an_image_is_refused(make_config, model, message):
    with pytest.raises(InputError, match=message):
        RowShape.from_config(make_config(**IMPOSSIBLE[message]).data, model)


def test_a_row_of_text_alone_needs_no_room_for_images(make_config, model):
    shape = RowShape.from_config(make_config(seq_len=16, images_per_row=0).data, model)
    assert (shape.tokens, shape.images, shape.patches) == (16, 0, 0)
    without_vision = dataclasses.replace(model, vision=None)
    assert RowShape.from_config(make_config(seq_len=16).data, without_vision).patches == 0
