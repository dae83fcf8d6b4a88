"""Chats from files, to the tokens and masks of the reference's template."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.chat import ChatTemplate
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.data.processor import Processor
from gemma4_jax.errors import InputError
from gemma4_jax.fields import to_dict
from gemma4_jax.run_config import RunConfig, SourceConfig
from gemma4_jax.tokenizer import Tokenizer
from tests import conversations
from tests.conversations import CONVERSATIONS, GEMMA4, GENERATION

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
TEMPLATES = {"gemma4": GEMMA4, "generation": GENERATION}


def tokenizer_in(folder, source=None):
    tokenizer = conversations.write_tokenizer(folder)
    if source is not None:
        (folder / "chat_template.jinja").write_text(source)
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Template -> folder of a tokenizer with it."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, source in TEMPLATES.items():
        tokenizer_in(root / name, source)
    return root


def examples(tokenizer, vision, folder, *records, **fields):
    (folder / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = SourceConfig("talks", path=str(folder / "talks.jsonl"), task="chat", **fields)
    documents = open_documents(config)
    encode = Encoder(tokenizer, vision, 70)
    return [encode(documents[i]).read() for i in range(len(documents))]


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "images"])
def test_same_tokens_as_the_reference(name, folders, model, tmp_path):
    transformers = pytest.importorskip("transformers")
    messages, options, parts = CONVERSATIONS[name]
    tokenizer = Tokenizer.load(str(folders / "gemma4"))
    record = {"messages": messages, **{k: v for k, v in options.items() if k == "tools"}}
    (example,) = examples(tokenizer, model.vision, tmp_path, record)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer.path), bos_token="<bos>", chat_template=GEMMA4
    )
    options = {k: v for k, v in options.items() if k == "tools"}
    assert example.tokens.tolist() == theirs.apply_chat_template(messages, return_dict=False, **options)
    assert tokenizer.decode(example.tokens[example.carries_loss].tolist()) == "".join(parts)


def test_same_mask_as_the_reference_where_a_template_has_generation_marks(folders, model, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(str(folders / "generation"))
    talks = [CONVERSATIONS[name][0] for name in ("one_turn", "several_turns")]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path), bos_token="<bos>")
    given = examples(tokenizer, model.vision, tmp_path, *({"messages": talk} for talk in talks))
    for example, talk in zip(given, talks, strict=True):
        expected = theirs.apply_chat_template(
            talk, chat_template=GENERATION, return_dict=True, return_assistant_tokens_mask=True
        )
        assert example.tokens.tolist() == expected["input_ids"]
        assert example.carries_loss.astype(int).tolist() == expected["assistant_masks"]


def test_a_chat_of_images_is_what_the_processor_makes_of_it(folders, model, tmp_path):
    """Tokens, loss and patches, with the images in a column, in the parts, and in a LLaVA record."""
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    PIL.Image.fromarray(PIXELS.swapaxes(0, 1)).save(tmp_path / "b.png")
    tokenizer = Tokenizer.load(str(folders / "gemma4"))
    said = [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]
    talk = [{"role": "user", "content": said}, conversations.assistant("Two <image>s.")]
    paths = iter(["a.png", "b.png"])
    inside = [part | {"path": next(paths)} if part["type"] == "image" else part for part in said]
    records = [
        {"images": ["a.png", "b.png"], "messages": talk},
        {"messages": [talk[0] | {"content": inside}, talk[1]]},
        {
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?<image>"},
                {"from": "gpt", "value": "Two <image>s."},
            ],
        },
    ]
    processor = Processor(tokenizer, model.vision, 70, ChatTemplate(GEMMA4, tokenizer))
    batch = processor(talk, images=[PIXELS, PIXELS.swapaxes(0, 1)])
    for example in examples(tokenizer, model.vision, tmp_path, *records):
        np.testing.assert_array_equal(example.tokens, batch.tokens[0])
        np.testing.assert_array_equal(example.carries_loss[1:], batch.loss_weights[0, :-1] > 0)
        np.testing.assert_array_equal(np.concatenate([image.patches for image in example.images]), batch.patches[0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_loss_on_the_last_turn_alone(name, folders, model, tmp_path):
    tokenizer = Tokenizer.load(str(folders / name))
    talk = CONVERSATIONS["several_turns"][0]
    (last,) = examples(tokenizer, model.vision, tmp_path, {"messages": talk}, options={"last_turn_only": True})
    assert tokenizer.decode(last.tokens[last.carries_loss].tolist()) == "4\n\nIt is é, 漢 and 🙂.<turn|>"
    (completion,) = examples(tokenizer, model.vision, tmp_path, {"prompt": talk[:3], "completion": talk[3:5]})
    assert completion.carries_loss.sum() == last.carries_loss.sum()


def test_a_tokenizer_without_a_template_gets_the_stated_one(model, tmp_path):
    tokenizer = tokenizer_in(tmp_path / "plain")
    said = [{"type": "text", "text": "Hi <eos>"}, {"type": "image"}]
    record = {"images": ["a.png"], "messages": [{"role": "user", "content": said}, conversations.assistant("Hello")]}
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (example,) = examples(tokenizer, model.vision, tmp_path, record)
    roles = tokenizer.tokens
    written = tokenizer.decode([token for token in example.tokens.tolist() if token != roles.image])
    assert written == "<bos><|turn>user\nHi <eos><|image><image|><turn|>\n<|turn>model\nHello<turn|>\n"
    assert roles.eos not in example.tokens  # of which the user only wrote the name
    assert tokenizer.decode(example.tokens[example.carries_loss].tolist()) == "Hello<turn|>"
    messages, options, _ = CONVERSATIONS["tool_messages"]
    with pytest.raises(InputError, match=r"talks\.jsonl line 1: the chat template .*it writes no tools"):
        examples(tokenizer, model.vision, tmp_path, {"messages": messages, "tools": options["tools"]})


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_is_read_before_the_first_step(name, make_config, model, tmp_path):
    tokenizer = tokenizer_in(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).write_text("{% if")
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": CONVERSATIONS["one_turn"][0]}))
    config = make_config(sources={"talks": {"path": f"{tmp_path}/talks.jsonl", "task": "chat"}})
    with pytest.raises(InputError, match="cannot be read"):
        make_train_iterator(_with_vocabulary(config, tokenizer), tokenizer)


def _with_vocabulary(config, tokenizer):
    values = to_dict(config)
    values["model"]["text"]["vocab_size"] = tokenizer.vocab_size
    values["model"]["tokens"] = dataclasses.asdict(tokenizer.tokens)
    return RunConfig.from_dict(values)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_chats_are_packed_beside_other_documents(num_workers, folders, make_config, tmp_path):
    """Templates cannot be pickled: worker processes compile their own."""
    tokenizer = Tokenizer.load(str(folders / "gemma4"))
    talk = CONVERSATIONS["several_turns"][0]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"text": "a"}) + "\n")
    sources = {name: {"path": f"{tmp_path}/talks.jsonl", "task": name} for name in ("chat", "text")}
    config = _with_vocabulary(make_config(sources=sources, num_workers=num_workers, max_left_out=0.9), tokenizer)
    iterator = make_train_iterator(config, tokenizer)
    batch = next(iterator)
    iterator.close()
    learned = tokenizer.decode(batch.targets[0][batch.loss_weights[0] > 0].tolist())
    assert "2<turn|>4\n\nIt is é, 漢 and 🙂.<turn|>" in learned
    assert "a<eos>" in learned


def test_a_chat_that_a_row_cannot_hold_is_left_out_whole(folders, make_config, tmp_path, caplog):
    tokenizer = Tokenizer.load(str(folders / "gemma4"))
    talk = [conversations.user("Why? " * 400), conversations.assistant("So.")]
    lines = [json.dumps({"messages": talk}), json.dumps({"messages": CONVERSATIONS["one_turn"][0]})]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    sources = {"talks": {"path": f"{tmp_path}/talks.jsonl", "task": "chat"}}
    config = _with_vocabulary(make_config(sources=sources, long_masked="cut_context", max_left_out=0.9), tokenizer)
    iterator = make_train_iterator(config, tokenizer)
    batch = next(iterator)
    iterator.close()
    assert "talks.jsonl line 1" in caplog.text
    assert tokenizer.decode(batch.targets[0][batch.loss_weights[0] > 0].tolist()).startswith("Hello!<turn|>Hello!")
