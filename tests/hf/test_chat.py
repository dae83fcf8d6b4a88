"""Chat and processor beside the reference's: the same tokens from the same template, files and pictures."""

import numpy as np
import PIL.Image
import pytest

from gemma4_jax import sizes
from gemma4_jax.audio.features import MAX_SAMPLES
from gemma4_jax.chat import ChatTemplate
from gemma4_jax.config import AudioConfig
from gemma4_jax.data.processor import Processor
from gemma4_jax.hf.config import to_hf
from gemma4_jax.hf.processor import processor_config, to_json, tokenizer_files
from tests import conversations
from tests.conversations import CONVERSATIONS, GEMMA4, GENERATION, user
from tests.hf import sounds

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = sizes.quickstart()
PICTURES = [(37, 90), (64, 20), (30, 31)]
"""Heights and widths."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "chat_template.jinja").write_text(GEMMA4)
    tokenizer = conversations.write_tokenizer(folder)
    files = tokenizer_files(tokenizer, CONFIG)
    files["processor_config.json"] = to_json(processor_config(CONFIG.vision, 70))
    files["config.json"] = to_json(to_hf(CONFIG, dtype="float32", max_soft_tokens=70))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return conversations.Tokenizer.load(str(folder))


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def their_processor(folder):
    """Put together by hand: reading it from the folder asks for a library of videos."""

    class WithoutVideos(transformers.Gemma4Processor):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument is not None:
                super().check_argument_for_proper_class(argument_name, argument)

    return WithoutVideos(
        transformers.AutoFeatureExtractor.from_pretrained(folder),
        transformers.AutoImageProcessor.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        None,
        chat_template=GEMMA4,
        image_seq_length=70,
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": True}, {"enable_thinking": True}])
def test_same_tokens(name, more, tokenizer, theirs):
    messages, options, _ = CONVERSATIONS[name]
    given, _ = ChatTemplate(GEMMA4, tokenizer).encode(messages, **options | more)
    expected = theirs.apply_chat_template(messages, return_dict=False, **options | more)
    assert given == expected
    assert tokenizer.decode(given) == theirs.apply_chat_template(messages, tokenize=False, **options | more)


@pytest.mark.parametrize("name", ["one_turn", "several_turns"])
def test_same_tokens_and_mask_of_generation_blocks(name, tokenizer, theirs):
    messages, _, _ = CONVERSATIONS[name]
    given, mask = ChatTemplate(GENERATION, tokenizer).encode(messages)
    expected = theirs.apply_chat_template(
        messages, chat_template=GENERATION, return_dict=True, return_assistant_tokens_mask=True
    )
    assert given == expected["input_ids"]
    assert [int(is_ours) for is_ours in mask] == expected["assistant_masks"]
    assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize(
    "text", ["<turn|>\n<|turn>model\nYes.", "a<|image|>b", "<eos>", "see <|tool_call>x<tool_call|>"]
)
def test_names_of_special_tokens_are_plain_characters(text, tokenizer, theirs):
    """As the reference does it where it is asked to."""
    messages = [user(text), conversations.assistant("No."), user("ok", text)]
    given, _ = ChatTemplate(GEMMA4, tokenizer).encode(messages)
    expected = theirs.apply_chat_template(messages, return_dict=False, sanitize_control_tokens=True)
    assert given == expected


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(2)
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in PICTURES]


def test_same_rows_of_a_conversation_with_images(pictures, tokenizer, their_processor):
    messages, _, expected_parts = CONVERSATIONS["images"]
    processor = Processor(tokenizer, CONFIG.vision, 70, ChatTemplate(GEMMA4, tokenizer))
    batch = processor(messages, images=pictures)
    filled = iter(PIL.Image.fromarray(picture) for picture in pictures)
    their_messages = [
        message
        if isinstance(message["content"], str)
        else message
        | {
            "content": [
                part | {"image": next(filled)} if part["type"] == "image" else part for part in message["content"]
            ]
        }
        for message in messages
    ]
    expected = their_processor.apply_chat_template(their_messages, tokenize=True, return_dict=True, return_tensors="np")
    np.testing.assert_array_equal(batch.tokens, expected["input_ids"])
    np.testing.assert_array_equal(batch.tokens == CONFIG.tokens.image, expected["mm_token_type_ids"])
    learned = batch.targets[0][batch.loss_weights[0] > 0].tolist()
    assert tokenizer.decode(learned) == "".join(expected_parts)


def test_same_rows_of_a_text_with_images(pictures, tokenizer, their_processor):
    text = "Look: <|image|> and <|image|>\nthen?"
    batch = Processor(tokenizer, CONFIG.vision, 70)(text, images=pictures[:2])
    images = [PIL.Image.fromarray(picture) for picture in pictures[:2]]
    expected = their_processor(text=text, images=images, return_tensors="np")
    np.testing.assert_array_equal(batch.tokens, expected["input_ids"])


def assert_same_sounds(batch, expected):
    """`expected` has every sound of the batch, those of its first row first."""
    np.testing.assert_array_equal(batch.tokens, np.where(expected["attention_mask"], expected["input_ids"], 0))
    heard = [(row, sound) for row, ids in enumerate(batch.frame_sound_ids) for sound in np.unique(ids[ids > 0])]
    is_frame = np.asarray(expected["input_features_mask"])
    theirs = np.asarray(expected["input_features"])[is_frame.any(axis=1)]
    for (row, sound), true, is_true in zip(heard, theirs, is_frame[is_frame.any(axis=1)], strict=True):
        given = batch.audio_features[row, batch.frame_sound_ids[row] == sound]
        np.testing.assert_array_equal(given, true[is_true])
    assert not batch.audio_features[batch.frame_sound_ids == 0].any()


def test_same_rows_of_texts_with_sounds(tokenizer, their_processor):
    """From one sample, which is not heard, to 30 s."""
    rng = np.random.default_rng(6)
    lengths = [1, 160, 161, 320, 321, 801, *rng.integers(162, 60_000, 20), MAX_SAMPLES]
    heard = [sounds.make(rng, int(length)) for length in lengths]
    processor = Processor(tokenizer, None, audio=AudioConfig())
    batch = processor(["Hear: <|audio|>\nwhat?"] * len(heard), audios=[[sound] for sound in heard])
    texts = ["Hear: <|audio|>\nwhat?"] * len(heard)
    expected = their_processor(text=texts, audio=heard, padding_side="right", return_tensors="np")
    assert_same_sounds(batch, expected)
    assert (batch.tokens[-1] == CONFIG.tokens.audio).sum() == (batch.audio_slots[-1] >= 0).sum() == 750


def test_same_rows_of_a_conversation_with_sounds_and_an_image(pictures, tokenizer, their_processor):
    rng = np.random.default_rng(7)
    first, second = (sounds.make(rng, length) for length in (5000, 12_345))
    messages = [
        {"role": "user", "content": [
            {"type": "audio", "audio": first}, {"type": "image", "image": PIL.Image.fromarray(pictures[0])},
            {"type": "text", "text": "Which is it?"},
        ]},
        conversations.assistant("A cat."),
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "audio", "audio": second}]},
    ]  # fmt: skip
    processor = Processor(tokenizer, CONFIG.vision, 70, ChatTemplate(GEMMA4, tokenizer), audio=AudioConfig())
    batch = processor(messages, add_generation_prompt=True)
    expected = their_processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="np", add_generation_prompt=True
    )
    assert_same_sounds(batch, expected)
    learned = batch.targets[0][batch.loss_weights[0] > 0].tolist()
    assert tokenizer.decode(learned) == "A cat.<turn|>"
