"""Pairs of answers: their shapes, and the tokens and masks that TRL makes of the same records."""

import json

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Pair
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.pairs import encode_pair
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.data.tasks import TASKS
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig
from gemma4_jax.tokenizer import Tokenizer
from tests import conversations
from tests.conversations import GEMMA4, GENERATION, WEATHER, assistant, user

ASKED = [user("1 + 1?"), assistant("2"), user("And 2 + 2?")]
GOOD, BAD = [assistant("4")], [assistant("5, \n I think.")]

RECORDS = {
    "messages": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "messages_that_begin_alike": {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "a_prompt_told_twice": {"prompt": "And 2 + 2?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "several_turns_of_an_answer": {
        "prompt": ASKED[:1],
        "chosen": [assistant("2"), user("Sure?"), assistant("Yes")],
        "rejected": [assistant("3")],
    },
    "tools": {"prompt": [user("Weather?")], "chosen": GOOD, "rejected": BAD, "tools": [WEATHER]},
    "texts": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green and\nblue."},
    "texts_that_begin_alike": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "texts_that_merge": {"prompt": "def f", "chosen": "rom(x):", "rejected": "ile(x):"},
    "one_goes_on": {"chosen": "a b", "rejected": "a b c"},
}


@pytest.fixture(scope="module", params=["gemma4", "generation"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = conversations.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text({"gemma4": GEMMA4, "generation": GENERATION}[request.param])
    return tokenizer


def opened(folder, *records, **fields):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_documents(SourceConfig("pairs", path=str(folder / "pairs.jsonl"), **fields), takes_pairs=True)


def of_trl(record, theirs):
    """[(tokens, mask)] of chosen and rejected, by the steps of TRL 1.16's DPOTrainer._prepare_dataset."""
    answers = record["chosen"], record["rejected"]
    is_chat = isinstance(record["chosen"], list)
    if "prompt" not in record or isinstance(record["prompt"], list) != is_chat:  # maybe_extract_prompt
        i = 0
        for i in range(min(map(len, answers))):
            if answers[0][i] != answers[1][i]:
                i -= answers[0][i - 1] == " "
                break
        prompt, answers = answers[0][:i], [answer[i:] for answer in answers]
    else:
        prompt = record["prompt"]
    if is_chat:
        options = {"return_dict": False, **({"tools": record["tools"]} if "tools" in record else {})}
        before = theirs.apply_chat_template(prompt, add_generation_prompt=True, **options)
        wholes = [theirs.apply_chat_template(prompt + answer, **options) for answer in answers]
    else:
        before = theirs(prompt)["input_ids"]
        wholes = [theirs(prompt + answer + theirs.eos_token)["input_ids"] for answer in answers]

    def shared(whole):
        return next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))

    start = min(map(shared, wholes))
    return [(whole, [i >= start for i in range(len(whole))]) for whole in wholes]


@pytest.mark.parametrize("name", RECORDS)
def test_same_tokens_and_masks_as_trl(name, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer.path), bos_token="<bos>", eos_token="<eos>",
        chat_template=(tokenizer.path.parent / "chat_template.jinja").read_text(),
    )  # fmt: skip
    pair = opened(tmp_path, RECORDS[name]).read(0)
    sides = [side.text for side in encode_pair(pair, Encoder(tokenizer, None, 70))]
    for side, (tokens, mask) in zip(sides, of_trl(RECORDS[name], theirs), strict=True):
        assert side.tokens.tolist() == tokens
        assert side.carries_loss.tolist() == mask
    num_shared = np.flatnonzero(sides[0].carries_loss)[0]
    assert np.array_equal(sides[0].tokens[:num_shared], sides[1].tokens[:num_shared])


@pytest.mark.parametrize(
    "record",
    [
        {
            "images": ["a.png"],
            "prompt": [user(None, "What?")],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        },
        {"image": "a.png", "chosen": [user("What?"), assistant("a")], "rejected": [user("What?"), assistant("b")]},
        {"image": "a.png", "prompt": "What?", "chosen": "a", "rejected": "b"},
    ],
)
def test_both_sides_have_the_images(record, tmp_path, model, tokenizer):
    PIL.Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    pair = opened(tmp_path, record).read(0)
    chosen, rejected = (side.read() for side in encode_pair(pair, Encoder(tokenizer, model.vision, 70)))
    assert np.array_equal(chosen.images[0].patches, rejected.images[0].patches)
    num_shared = np.flatnonzero(chosen.carries_loss)[0]
    assert np.array_equal(chosen.tokens[:num_shared], rejected.tokens[:num_shared])
    assert (chosen.tokens[:num_shared] == tokenizer.tokens.image).any()
    assert tokenizer.decode(chosen.tokens[num_shared:].tolist()).startswith("a<turn|>")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": "a", "rejected": [assistant("b")]}, "must both be texts, or both lists of messages"),
        ({"chosen": 1.5, "rejected": None}, "text cannot be None"),
        ({"prompt": [], "chosen": [{"role": "robot"}], "rejected": BAD}, "message 0: its role is 'robot'"),
    ],
)
def test_what_is_no_pair_is_refused(record, reason):
    with pytest.raises(InputError, match=reason):
        TASKS["preference"](**record)


def test_a_pair_is_known_by_its_columns():
    record = {**RECORDS["messages_that_begin_alike"], "messages": ASKED + GOOD, "prompt_id": 3}
    assert isinstance(TASKS["auto"](**record), Pair)


@pytest.mark.parametrize("task", ["preference", "auto"])
def test_training_says_what_to_do_with_pairs(task, make_config, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(RECORDS["messages"]))
    config = make_config(sources={"pairs": {"path": f"{tmp_path}/pairs.jsonl", "task": task}})
    with pytest.raises(InputError, match=r"no objective reads pairs yet.*columns=\{'messages': 'chosen'\}"):
        next(make_train_iterator(config, Tokenizer.load("bundled")))


@pytest.mark.parametrize(
    ("name", "columns"),
    [("messages_that_begin_alike", {"messages": "chosen"}), ("messages", {"completion": "chosen"}),
     ("texts", {"completion": "chosen"})],
)  # fmt: skip
def test_the_chosen_alone_are_chats(name, columns, tmp_path, tokenizer):
    documents = opened(tmp_path, RECORDS[name], task="chat", columns=columns)
    example = Encoder(tokenizer, None, 70)(documents[0]).text
    said = tokenizer.decode(example.tokens[example.carries_loss].tolist())
    assert said.endswith("blue.<turn|>" if name == "texts" else "4<turn|>")
