import numpy as np
import pytest

from gemma4_jax.config import AudioConfig
from gemma4_jax.data.document import Document, Image, Sound, Text
from gemma4_jax.data.encode import (
    MAX_CHARACTERS,
    MIN_QUESTION,
    Encoder,
)
from gemma4_jax.data.example import Unreadable
from gemma4_jax.data.mixture import Examples
from gemma4_jax.errors import InputError

PIXELS = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)


@pytest.fixture
def encode(tokenizer, model):
    return Encoder(tokenizer, model.vision, 140)


@pytest.fixture
def read(encode):
    return lambda document: encode(document).read()


def test_segments_become_tokens_in_order(read, tokenizer):
    example = read(Document((Text("see ", loss=False), Image(PIXELS), Text("ok\n")), "one"))
    m = example.images[0].num_soft_tokens
    assert 0 < m <= 140
    see, ok = tokenizer.encode("see "), tokenizer.encode("ok\n")
    assert example.tokens.tolist() == [2, *see, 7, *[8] * m, 9, *ok, 1]
    assert example.carries_loss.tolist() == [False] * (1 + len(see) + m + 2) + [True] * (len(ok) + 1)


def test_an_image_may_bring_its_own_budget(read):
    example = read(Document((Image(PIXELS, 70),), "one"))
    assert example.images[0].num_soft_tokens <= 70


@pytest.mark.parametrize("budget", [71, 280, -70, 70.0, "70", True])
def test_a_budget_above_the_runs_own_is_refused(encode, budget):
    with pytest.raises(InputError, match=f"one: max_soft_tokens={budget!r} .* 70, 140"):
        encode(Document((Image(PIXELS, budget),), "one"))


def test_a_model_without_a_vision_tower_refuses_images(tokenizer):
    with pytest.raises(InputError, match="no vision tower"):
        Encoder(tokenizer, None, 70)(Document((Image(PIXELS),), "one"))


def test_an_unreadable_record_is_named_not_raised(encode):
    documents = [Document((Text("fine"),), "good"), Document((Image(b"broken"),), "bad")]
    good, bad = (Examples("mine", documents, encode)[i] for i in range(2))
    assert (good.text.name, good.text.source, bad.source) == ("good", "mine", "mine")
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
def test_the_end_is_learned_where_the_last_text_is(read, segments, is_learned):
    example = read(Document(segments, "one"))
    assert example.carries_loss[-1] == is_learned
    assert example.carries_loss.any() == (LEARNED in segments)


def test_the_question_is_no_context(read, tokenizer):
    context, question = Text("a b c " * 20, loss=False), Text("what is it? ", loss=False)
    long = len(tokenizer.encode(context.text))
    for segments, expected in [
        ((context, question, LEARNED), long),
        ((context, LEARNED), long - MIN_QUESTION),
        ((question, LEARNED), 0),
        ((Image(PIXELS), context, question, LEARNED), 0),
        ((LEARNED, context, question), 0),
    ]:
        assert read(Document(segments, "one")).context == expected


@pytest.mark.parametrize("text", ["half of a character: \ud800", "x" * (MAX_CHARACTERS + 1)])
def test_a_text_that_is_refused_names_its_document(encode, text):
    with pytest.raises(InputError, match=r"^one: .*(surrogate|characters is refused)"):
        encode(Document((Text(text),), "one"))


SAMPLES = np.random.default_rng(0).uniform(-0.5, 0.5, 4000)


def test_a_sound_becomes_its_soft_tokens_between_marks(tokenizer, model):
    encode = Encoder(tokenizer, model.vision, 140, AudioConfig())
    example = encode(Document((Image(PIXELS), Sound(SAMPLES), Text("ok"), Sound(SAMPLES[:900])), "one")).read()
    roles, frames = tokenizer.tokens, [len(sound) for sound in example.sounds]
    assert [sound.shape[1] for sound in example.sounds] == [128, 128]
    expected = [roles.bos, roles.begin_image, *[roles.image] * example.images[0].num_soft_tokens, roles.end_image]
    for n, text in zip(frames, ("ok", ""), strict=True):
        soft_tokens = [roles.audio] * -(-n // 4)
        expected += [roles.begin_audio, *soft_tokens, roles.end_audio, *tokenizer.encode(text)]
    assert example.tokens.tolist() == [*expected, roles.eos]
    assert example.carries_loss.sum() == len(tokenizer.encode("ok")) + 1


def test_a_model_without_an_audio_tower_refuses_sounds(encode):
    with pytest.raises(InputError, match=r"^one: cat\.wav: The model has no audio tower"):
        encode(Document((Sound(SAMPLES, "cat.wav"), Text("miaow")), "one"))


def test_a_sound_that_is_none_names_its_file(tokenizer):
    with pytest.raises(InputError, match=r"^one: cat\.wav: A sound file cannot be decoded"):
        Encoder(tokenizer, None, 70, AudioConfig())(Document((Sound(b"RIFF", "cat.wav"),), "one"))
