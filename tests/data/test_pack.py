import dataclasses
import itertools
import json

import numpy as np
import pytest

from gemma4_jax.data import packer
from gemma4_jax.data.example import Example, SizedExample, SizedImage, SizedSound, Unreadable
from gemma4_jax.data.pack import RowShape, Rules, choose, size_of
from gemma4_jax.data.packer import LOOKAHEAD, Packer
from gemma4_jax.data.tally import Judge
from gemma4_jax.errors import InputError

SHAPE = RowShape(tokens=50, images=3, patches=80, patch_dim=12)


def text_example(length, name="text"):
    return SizedExample(Example(np.arange(length, dtype=np.int32), np.ones(length, bool), (), name, source="mine"))


def change(example, **changes):
    return dataclasses.replace(example, text=dataclasses.replace(example.text, **changes))


def masked_example(context, question, answer, name="masked"):
    """<bos>, text without loss of which `context` tokens may be cut, what is learned."""
    length = 1 + context + question + answer
    return change(text_example(length, name), carries_loss=np.arange(length) > context + question, context=context)


def image(patches):
    """A strip of so many patches, in cells of four."""
    return SizedImage(np.zeros((4, patches, 3), np.uint8), 2, patches // 2, 2, 2, patches // 4)


def image_example(length, patches, name="image"):
    return dataclasses.replace(text_example(length, name), images=tuple(map(image, patches)))


class packing:  # noqa: N801  # reads as the verb
    """The rows of some examples, as an iterator with a state."""

    def __init__(self, examples, shape=SHAPE, **rules):
        self.packer = Packer(examples, shape, Rules(**rules), Judge(rules.get("max_left_out", 0.5)).tally())

    def __iter__(self):
        return self

    def __next__(self):
        row = self.packer.next_row()
        if row is None:
            raise StopIteration
        return row

    def get_state(self):
        return json.loads(json.dumps(self.packer.get_state()))

    def set_state(self, state):
        self.packer.set_state(state)


def counts(iterator, source="mine"):
    """The counters of a source that are not 0."""
    return {name: count for name, count in iterator.get_state()["tally"][source].items() if count}


def random_examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        image_example(rng.integers(5, 50), 4 * rng.integers(1, 6, rng.integers(4)), name=f"document {i}")
        for i in range(n)
    ]


def test_every_example_is_packed_once_and_every_row_holds():
    examples = random_examples(200)
    rows = list(packing(examples))
    assert sorted(example.name for row in rows for example in row) == sorted(example.text.name for example in examples)
    for row in rows:
        tokens, images, patches, _ = np.sum([size_of(example) for example in row], axis=0)
        assert tokens <= SHAPE.tokens
        assert images <= SHAPE.images
        assert patches <= SHAPE.patches


def test_rows_are_well_filled():
    rows = list(packing([text_example(int(n)) for n in np.random.default_rng(0).integers(5, 40, 1000)]))
    filled = np.mean([sum(len(example.tokens) for example in row) / SHAPE.tokens for row in rows[:-5]])
    assert filled > 0.97


def mixture(num_documents, tokens, seed=0):
    """[n, 4] sizes of short chats, long documents, and one to four images of 50 sizes with what is said of them."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(3, num_documents, p=[0.3, 0.1, 0.6])
    sizes = []
    for kind in kinds:
        num_images = rng.choice([1, 1, 1, 2, 3, 4]) if kind == 2 else 0
        soft = int(rng.choice(np.linspace(30, 280, 50).astype(int), num_images).sum())
        said = int(np.clip(rng.lognormal(*[(5.3, 0.7), (7.6, 0.6), (4.3, 0.8)][kind]), 10, tokens - 1200))
        sizes.append((said + soft + 2 * num_images, num_images, 9 * soft, 0))
    return np.array(sizes)


@pytest.mark.parametrize("seq_len", [4096, 8192])
def test_a_mixture_fills_tokens_and_patches(seq_len):
    """With room for 1.15 times the patches that the tokens of a row bring, which would be 87% if no token were free."""
    sizes = mixture(3000, seq_len)
    room = np.array([seq_len, 64, 9 * int(1.15 / 9 * seq_len * sizes[:, 2].sum() / sizes[:, 0].sum()), 0])
    rows, waiting = [], list(range(len(sizes)))
    while len(waiting) > LOOKAHEAD:
        chosen = [waiting[i] for i in choose(sizes[waiting[:LOOKAHEAD]], room)]
        rows.append(sizes[chosen].sum(axis=0))
        waiting = [i for i in waiting if i not in chosen]
    tokens, _, patches, _ = np.mean(rows, axis=0)
    assert tokens / room[0] > 0.98
    assert patches / room[2] > 0.86


def test_a_row_takes_what_leaves_least_of_tokens_and_patches():
    sizes = np.array([(10, 1, 20, 0), (60, 0, 0, 0), (50, 1, 60, 0), (40, 1, 60, 0), (90, 0, 0, 0), (40, 0, 0, 0)])
    assert choose(sizes, np.array([100, 4, 80, 0])) == [0, 2, 5]
    assert choose(sizes, np.array([100, 1, 80, 0])) == [0, 4]  # no image is left
    assert choose(sizes[1:2], np.array([100, 0, 0, 0])) == [0]


def test_one_of_a_full_row_is_exchanged_for_those_that_fill_it_better():
    sizes = np.array([(20, 0, 0, 0), (50, 0, 0, 0), (40, 0, 0, 0), (40, 0, 0, 0)])
    assert choose(sizes, np.array([100, 0, 0, 0])) == [0, 2, 3]  # not 0 and 1, behind which nothing fits


def test_what_is_held_of_images_that_wait_is_bounded(monkeypatch):
    monkeypatch.setattr(packer, "WAITING_BYTES", 10 * 3 * 4 * 20)
    iterator = packing(
        [image_example(30, [20], f"document {i}") for i in range(60)], dataclasses.replace(SHAPE, tokens=10**4)
    )
    first = next(iterator)
    assert len(first) + len(iterator.get_state()["waiting"].split(";")) == 10
    assert [example.name for row in [first, *iterator] for example in row] == [f"document {i}" for i in range(60)]


def test_the_look_ahead_grows_with_the_rows():
    """So that the first row does not wait for all that later rows choose among."""
    iterator = packing([text_example(25)] * 1000)
    waiting = []
    for _ in range(20):
        row = next(iterator)
        waiting.append(len(row) + sum(stop - start for _, start, stop, *_ in lines_of(iterator)))
    assert waiting[:3] == [4, 8, 12]
    assert waiting[-1] == 80


def lines_of(iterator):
    return [list(map(int, line.split())) for line in iterator.get_state()["waiting"].split(";") if line]


def test_an_image_that_proves_damaged_leaves_a_hole_and_is_counted(caplog):
    broken = dataclasses.replace(image(8), content=b"no image", name="cat.png")
    damaged = dataclasses.replace(text_example(20, "damaged"), images=(broken,))
    iterator = packing([text_example(10), damaged, text_example(15, "other"), damaged])
    assert [[example.name for example in row] for row in iterator] == [["text"], ["other"]]
    assert counts(iterator) == {"read": 4, "documents": 2, "unreadable": 2}
    assert "damaged: cat.png: an image cannot be decoded" in caplog.text


def test_an_image_that_may_be_missing_and_proves_damaged_is_left_out():
    roles = {"tokens": np.array([2, 7, 8, 8, 9, 5, 7, 8, 9, 6]), "carries_loss": np.arange(10) % 5 == 0}
    broken = dataclasses.replace(image(8), content=b"no image", may_be_missing=True)
    example = SizedExample(Example(**roles, images=(), name="one", source="mine"), (broken, image(4)), image_token=8)
    iterator = packing([example])
    ((read,),) = iterator
    assert read.tokens.tolist() == [2, 5, 7, 8, 9, 6]
    assert read.carries_loss.tolist() == [True, True, False, False, False, False]
    assert [found.num_patches for found in read.images] == [4]
    assert counts(iterator) == {"read": 1, "documents": 1, "images": 1, "images_missing": 1}


def test_where_a_source_has_dropped_out_there_is_nothing():
    iterator = packing([None, text_example(30), None, None, text_example(20, "other"), None])
    assert [[example.name for example in row] for row in iterator] == [["text", "other"]]


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
    assert counts(iterator) == {"read": 1, "documents": 1, "split": 1}


@pytest.mark.parametrize(
    "unfit",
    [image_example(51, [4]), image_example(10, [4] * 4), image_example(10, [40, 40, 4])],
)
def test_images_that_do_not_fit_are_dropped_and_counted(unfit):
    iterator = packing([unfit, image_example(10, [4, 4]), Unreadable("bad record", "mine")])
    rows = list(iterator)
    assert [[example.name for example in row] for row in rows] == [["image"]]
    assert counts(iterator) == {"read": 3, "documents": 1, "images": 2, "dropped": 1, "unreadable": 1}


def test_sounds_are_dropped_by_rows_that_have_no_room_for_them(caplog):
    heard = dataclasses.replace(text_example(10, "heard"), sounds=(SizedSound.of(np.zeros(3200), mel_bins=8),))
    assert [row[0].name for row in packing([heard, text_example(50)])] == ["text"]
    assert "heard: 10 tokens, 0 images and 0 patches, with 24 frames of sounds, do not fit" in caplog.text
    ((example,),) = packing([heard], dataclasses.replace(SHAPE, frames=24, mel_bins=8))
    assert example.name == "heard"


def test_text_with_a_masked_part_is_never_split():
    fits, long = masked_example(20, 9, 20), masked_example(60, 9, 20, "long")
    iterator = packing([fits, long])
    assert [example.name for row in iterator for example in row] == ["masked"]
    assert counts(iterator) == {"read": 2, "documents": 1, "dropped": 1}


def test_context_is_cut_from_the_left_where_the_run_says_so():
    long, hopeless = masked_example(60, 9, 20), masked_example(5, 60, 20, "hopeless")
    iterator = packing([long, hopeless], long_masked="cut_context")
    ((example,),) = iterator
    assert example.tokens.tolist() == [0, *range(41, 90)]  # <bos>, the end of the context, the question, the answer
    assert example.carries_loss.tolist() == [False] * 30 + [True] * 20
    assert counts(iterator) == {"read": 2, "documents": 1, "shortened": 1, "dropped": 1}


def test_what_has_nothing_to_learn_is_left_out_under_its_own_reason(caplog):
    silent = masked_example(5, 5, 0, "silent")
    iterator = packing([silent, text_example(10), masked_example(70, 5, 0)])
    assert [example.name for row in iterator for example in row] == ["text"]
    assert counts(iterator) == {"read": 3, "documents": 1, "nothing_to_learn": 2}
    assert "silent: nothing to learn" in caplog.text


def bad(i, source="mine"):
    return Unreadable(f"{source} {i}: bad record.", source)


def test_a_source_that_gives_nothing_stops_the_run_although_another_works():
    examples = [example for i in range(60) for example in (text_example(9), bad(i, "broken"))]
    iterator = packing(examples)
    with pytest.raises(InputError, match=r"40 of 40 documents read of 'broken' .*40 unreadable.*broken 39: bad record"):
        list(iterator)
    assert len(list(packing(examples[:78]))) > 0
    # Where more may be left out, chance alone leaves out more one after another.
    assert len(list(packing(examples, max_left_out=0.9))) > 0


def test_a_share_left_out_that_is_too_large_stops_the_run():
    examples = [bad(i) if i % 5 < 3 else text_example(9) for i in range(200)]
    with pytest.raises(InputError, match=r"61 of 101 documents read of 'mine'.*data\.max_left_out=0\.5"):
        list(packing(examples))
    assert counts(packed(packing(examples, max_left_out=0.7)))["unreadable"] == 120
    with pytest.raises(InputError, match="1 of 1 documents"):
        list(packing(examples, max_left_out=0.0))


def packed(iterator):
    list(iterator)
    return iterator


def test_the_share_is_the_same_across_a_resume():
    examples = [bad(i) if i % 5 < 3 else text_example(9) for i in range(200)]
    iterator = packing(examples)
    next(iterator)
    resumed = packing(examples)
    resumed.set_state(iterator.get_state())
    with pytest.raises(InputError, match="61 of 101 documents read of 'mine'"):
        list(resumed)


def test_sequences_of_one_process_are_judged_together():
    judge = Judge(0.5)
    examples = [bad(i) if i % 5 < 3 else text_example(9) for i in range(60)]
    packers = [Packer(examples, SHAPE, Rules(), judge.tally()) for _ in range(2)]
    with pytest.raises(InputError, match="61 of 101 documents read of 'mine'"):
        list(itertools.chain.from_iterable(iter(one.next_row, None) for one in packers))


def test_each_document_left_out_is_named_once(caplog):
    epoch = [bad(0), bad(1), *[text_example(9)] * 8]
    packed(packing(epoch * 5))
    assert len(caplog.records) == 2


def test_it_goes_on_from_any_row():
    examples = random_examples(60)
    for i in range(0, 60, 7):
        examples[i] = text_example(130, f"long {i}")
    examples[3] = bad(3)
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


def test_a_waiting_document_that_changed_is_named_and_left_out_only_if_allowed():
    iterator = packing([text_example(40, "first"), text_example(120, "second")])
    next(iterator)
    state = iterator.get_state()
    shorter = text_example(60, "second")  # its first piece is what it was
    for second, named, still_there in (
        (shorter, "second: it has another length", 1),
        (bad(1), "mine 1: bad record", 0),
    ):
        changed = [text_example(40, "first"), second]
        resumed = packing(changed)
        resumed.set_state(state)
        with pytest.raises(InputError, match=rf"not what it was.*'mine'.*{named}.*data\.allow_changes=true"):
            list(resumed)
        allowed = packing(changed, allow_changes=True)
        allowed.set_state(state)
        assert sum(map(len, allowed)) == still_there
        assert counts(allowed)["unreadable"] == 3 - still_there


def test_the_state_does_not_grow_with_the_pieces_of_a_text():
    iterator = packing([text_example(40), text_example(50 * 5000)])
    for _ in range(3):
        next(iterator)
    assert len(json.dumps(iterator.get_state(), indent=4)) < 1500


IMPOSSIBLE = {
    "seq_len=73 is shorter than one image": {"seq_len": 73},
    "seq_len=4096 is not possible": {"seq_len": 4096},
    "patches_per_row=276 is not possible.*at least 280": {"patches_per_row": 276},
    "patches_per_row=1122 is not possible.*multiple of 4": {"patches_per_row": 1122},
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
