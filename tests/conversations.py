"""Conversations, templates and a tokenizer for the tests of chat, and of all that goes through it."""

import json
from pathlib import Path
from typing import Any

from gemma4_jax.tokenizer import NAMES, Tokenizer

TEMPLATES = Path(__file__).parent / "chat_templates"
GEMMA4 = (TEMPLATES / "gemma4.jinja").read_text()
"""Turns, thoughts, tools and images as in the released checkpoints, which say nowhere what the model's part is."""
GENERATION = (TEMPLATES / "generation.jinja").read_text()
"""A template that says what the model's part is."""


def write_tokenizer(folder: Path, *, in_place_of_rare_tokens: bool = False) -> Tokenizer:
    """The bundled tokenizer with every special token of the chat format.

    Args:
      folder: for its tokenizer.json.
      in_place_of_rare_tokens: the vocabulary grows no larger: the last tokens give their ids away.
    """
    content = json.loads(Tokenizer.load("bundled").path.read_text())
    known = {token["content"] for token in content["added_tokens"]}
    new = [token for token in NAMES.values() if token not in known]
    vocab, model = content["model"]["vocab"], content["model"]
    first = len(vocab)
    if in_place_of_rare_tokens:
        first -= len(new)
        model["vocab"] = vocab = {token: i for token, i in vocab.items() if i < first}
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) in vocab]
    for token_id, token in enumerate(new, start=first):
        vocab[token] = token_id
        content["added_tokens"].append(content["added_tokens"][0] | {"id": token_id, "content": token})
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer(folder / "tokenizer.json")


def user(*parts: str | None) -> dict[str, Any]:
    """What a user says: texts, and None for an image."""
    if len(parts) == 1 and parts[0] is not None:
        return {"role": "user", "content": parts[0]}
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def assistant(content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    # Name -> messages, options, and the model's part by hand.
    "one_turn": ([user("Hi there."), assistant("  Hello!  ")], {}, ["Hello!<turn|>"]),
    "several_turns": (
        [
            {"role": "system", "content": "Be brief."},
            user("1 + 1?"),
            assistant("2"),
            user("And\n\n2 + 2?\n"),
            assistant("4\n\nIt is é, 漢 and 🙂."),
            user("Thanks."),
        ],
        {},
        ["2<turn|>", "4\n\nIt is é, 漢 and 🙂.<turn|>"],
    ),
    "images": (
        [
            user(None, "What is this?"), assistant("A cat."),
            user("And these: ", None, "and", None), assistant("Two dogs."),
        ],
        {},
        ["A cat.<turn|>", "Two dogs.<turn|>"],
    ),
    "thoughts": (
        [
            user("Think."), assistant("<|channel>thought\nold<channel|>Done."),
            user("Again."), assistant("Yes.", reasoning_content="new thought"),
        ],
        {"enable_thinking": True},
        ["Done.<turn|>", "<|channel>thought\nnew thought<channel|>Yes.<turn|>"],
    ),
    "tool_messages": (
        [
            user("Weather in Bern?"),
            assistant(tool_calls=[call("weather", city="Bern", days=2, exact=True)]),
            {"role": "tool", "name": "weather", "content": "sunny"},
            assistant("It is sunny."),
            user("Thanks."), assistant("Any time."),
        ],
        {"tools": [WEATHER]},
        [
            '<|tool_call>call:weather{city:<|"|>Bern<|"|>,days:2,exact:true}<tool_call|><|tool_response>',
            "It is sunny.<turn|>", "Any time.<turn|>",
        ],
    ),
    "tool_responses": (
        [
            user("Weather in Bern and Rome?"),
            assistant(
                tool_calls=[call("weather", city="Bern"), call("weather", city="Rome")],
                tool_responses=[
                    {"name": "weather", "response": {"sky": "clear", "degrees": [1, 2.5]}},
                    {"name": "weather", "response": "rain"},
                ],
            ),
            assistant("Clear, and rain."),
        ],
        {"tools": [WEATHER]},
        [
            '<|tool_call>call:weather{city:<|"|>Bern<|"|>}<tool_call|><|tool_call>call:weather{city:<|"|>Rome<|"|>}'
            "<tool_call|><|tool_response>",
            "<|tool_response>", "Clear, and rain.<turn|>",
        ],
    ),
    "ends_with_a_tool": (
        [
            user("Weather?"), assistant(tool_calls=[call("weather", city="Bern")]),
            {"role": "tool", "name": "weather", "content": "sunny"},
        ],
        {"tools": [WEATHER]},
        ['<|tool_call>call:weather{city:<|"|>Bern<|"|>}<tool_call|><|tool_response>'],
    ),
}  # fmt: skip
