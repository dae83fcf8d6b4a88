import numpy as np
import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.tokenize import DocumentTokenizer, TokenizedSource, Unreadable
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
    good, bad = (TokenizedSource(documents, tokenize)[i] for i in range(2))
    assert good.name == "good"
    assert isinstance(bad, Unreadable)
    assert bad.reason.startswith("bad: ")
