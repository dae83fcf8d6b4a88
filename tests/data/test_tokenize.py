import numpy as np
import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.tokenize import (
    MAX_CHARACTERS,
    MIN_QUESTION,
    DocumentTokenizer,
    TokenizedSource,
    Unreadable,
)
from gemma4_jax.errors import InputError

PIXELS = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)


@pytest.fixture
def tokenize(tokenizer, model):
    return DocumentTokenizer(tokenizer, model.vision, 140)


def test_segments_become_tokens_in_order(tokenize, tokenizer):
    example = tokenize(Document((Text("see ", loss=False), Image(PIXELS), Text("ok\n")), "one"))
    m = example.images[0].num_soft_tokens
    assert 0 < m <= 140
    see, ok = tokenizer.encode("see "), tokenizer.encode("ok\n")
    assert example.tokens.tolist() == [2, *see, 7, *[8] * m, 9, *ok, 1]
    assert example.carries_loss.tolist() == [False] * (1 + len(see) + m + 2) + [True] * (len(ok) + 1)


def test_an_image_may_bring_its_own_budget(tokenize):
    example = tokenize(Document((Image(PIXELS, 70),), "one"))
    assert example.images[0].num_soft_tokens <= 70


@pytest.mark.parametrize("budget", [71, 280, -70, 70.0, "70", True])
def test_a_budget_above_the_runs_own_is_refused(tokenize, budget):
    with pytest.raises(InputError, match=f"one: max_soft_tokens={budget!r} .* 70, 140"):
        tokenize(Document((Image(PIXELS, budget),), "one"))


def test_a_model_without_a_vision_tower_refuses_images(tokenizer):
    with pytest.raises(InputError, match="no vision tower"):
        DocumentTokenizer(tokenizer, None, 70)(Document((Image(PIXELS),), "one"))


def test_an_unreadable_record_is_named_not_raised(tokenize):
    documents = [Document((Text("fine"),), "good"), Document((Image(b"broken"),), "bad")]
    good, bad = (TokenizedSource("mine", documents, tokenize)[i] for i in range(2))
    assert (good.name, good.source, bad.source) == ("good", "mine", "mine")
    assert isinstance(bad, Unreadable)
    assert bad.reason.startswith("bad: ")


MASKED, LEARNED = Text("see ", loss=False), Text("ok\n")


@pytest.mark.parametrize(
    ("segments", "is_learned"),
    [
        ((LEARNED,), True),
        ((MASKED, LEARNED), True),
        ((LEARNED, Image(PIXELS)), True),
        ((LEARNED, MASKED), False),
        ((MASKED, Text("")), False),
        ((Text(""),), False),
        ((Image(PIXELS),), False),
    ],
)
def test_the_end_is_learned_where_the_last_text_is(tokenize, segments, is_learned):
    example = tokenize(Document(segments, "one"))
    assert example.carries_loss[-1] == is_learned
    assert example.carries_loss.any() == (LEARNED in segments)


def test_the_question_is_no_context(tokenize, tokenizer):
    context, question = Text("a b c " * 20, loss=False), Text("what is it? ", loss=False)
    long = len(tokenizer.encode(context.text))
    for segments, expected in [
        ((context, question, LEARNED), long),
        ((context, LEARNED), long - MIN_QUESTION),
        ((question, LEARNED), 0),
        ((Image(PIXELS), context, question, LEARNED), 0),
        ((LEARNED, context, question), 0),
    ]:
        assert tokenize(Document(segments, "one")).context == expected


@pytest.mark.parametrize("text", ["half of a character: \ud800", "x" * (MAX_CHARACTERS + 1)])
def test_a_text_that_is_refused_names_its_document(tokenize, text):
    with pytest.raises(InputError, match=r"^one: .*(surrogate|characters is refused)"):
        tokenize(Document((Text(text),), "one"))
