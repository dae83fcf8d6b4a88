"""Conversations in the forms that people have them:

    {"messages": [{"role": "user", "content": TEXT or PARTS}, {"role": "assistant", "content": TEXT}], "tools": [...]}
    {"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}
    {"instruction": TEXT, "input": TEXT, "output": TEXT, "system": TEXT, "history": [[TEXT, TEXT]]}
    {"prompt": TEXT or MESSAGES, "completion": TEXT or MESSAGES}
    {"texts": [{"user": TEXT, "assistant": TEXT}]}

An image stands in its part, {"type": "image", "image": ...} or {"type": "image_url", "image_url": {"url": ...}}; or in
the column `image` or `images`, for each {"type": "image"}, and each "<image>" in a text that is not the model's, in
order. Where nothing says where they stand, it is before the first thing that the user says. Sounds likewise: audio,
audios, "<audio>". "<image>" is a place in `conversations` always, in other forms where a column has images.

A video is a list of its frames and their times, {"type": "video", "video": [IMAGE, IMAGE], "fps": 2} or {"timestamps":
[0, 0.5]}; or in the column `video`, or of `videos` each, with `fps` or `timestamps` beside, for each "<video>".
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from gemma4_jax.data.document import Conversation, Document
from gemma4_jax.data.tasks.places import MAX_PARTS, Message, place
from gemma4_jax.data.tasks.text import as_text
from gemma4_jax.data.tasks.video import SOFT_TOKENS_PER_FRAME
from gemma4_jax.errors import InputError

MAX_MESSAGES = 4096
"""Of a conversation."""

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""Who speaks, by what records call them."""


def chat(
    *, last_turn_only: bool = False, soft_tokens_per_frame: int = SOFT_TOKENS_PER_FRAME, **record: Any
) -> Document:
    """A conversation, of which the turns of the model carry loss.

    Args:
      last_turn_only: only the last of them does. Of a prompt of messages, those of its completion do in any case.
      soft_tokens_per_frame: budget of each frame of a video.
      record: see this module's page. Nulls in it are left out: Arrow puts them where a row lacks what another has.
    """
    try:
        given = _without_nulls(record)
    except RecursionError as error:
        raise InputError("it is nested too deeply.") from error
    forms = [columns for columns in FORMS if given.keys() >= set(columns)]
    if len(forms) != 1:
        have = "no conversation" if not forms else f"several conversations ({', '.join(form[0] for form in forms)})"
        accepted = ", or ".join(" and ".join(columns) for columns in FORMS)
        columns = ", ".join(map(str, record))
        raise InputError(f"it has {have} in its columns {columns:.200}: a chat has {accepted}; name others in columns.")
    messages, num_learned = FORMS[forms[0]](given)
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InputError(f"a conversation of {len(messages)} messages is refused: it may have 1 to {MAX_MESSAGES}.")
    if "system" in given and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": as_text(given["system"])}, *messages]
    marks_images = forms[0] == ("conversations",)
    messages, segments, videos = place(messages, given, soft_tokens_per_frame, marks_images=marks_images)
    tools = _json(given["tools"]) if given.get("tools") else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError(f"tools must be a list of JSON schemas of functions, and are {tools!r:.100}.")
    if last_turn_only:
        num_learned = 1
    conversation = Conversation(tuple(messages), tuple(tools) if tools else None, num_learned, videos)
    return Document(segments, conversation=conversation)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value if inner is not None] if isinstance(value, list | tuple) else value


def _from_messages(record: Mapping[str, Any]) -> tuple[list[Message], None]:
    return _messages(record["messages"]), None


def _from_conversations(record: Mapping[str, Any]) -> tuple[list[Message], None]:
    return _messages(record["conversations"]), None


def _from_instruction(record: Mapping[str, Any]) -> tuple[list[Message], None]:
    asked = [as_text(record[name]) for name in ("instruction", "input") if record.get(name)]
    history = record.get("history", [])
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise InputError(f"history must be a list of [question, answer], and is {history!r:.100}.")
    return _turns([*history, ("\n\n".join(asked), record["output"])]), None


def _from_prompt(record: Mapping[str, Any]) -> tuple[list[Message], int]:
    prompt, completion = record["prompt"], record["completion"]
    before = _messages(prompt) if isinstance(prompt, list) else [{"role": "user", "content": as_text(prompt)}]
    answer = {"role": "assistant", "content": completion}
    after = _messages(completion if isinstance(completion, list) else [answer])
    return before + after, sum(message["role"] == "assistant" for message in after)


def _from_texts(record: Mapping[str, Any]) -> tuple[list[Message], None]:
    texts = record["texts"]
    if not isinstance(texts, list) or not all(
        isinstance(t, Mapping) and {"user", "assistant"} <= t.keys() for t in texts
    ):
        raise InputError(f'texts must be a list of {{"user": TEXT, "assistant": TEXT}}, and are {texts!r:.100}.')
    return _turns([(turn["user"], turn["assistant"]) for turn in texts]), None


FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], tuple[list[Message], int | None]]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_conversations,
    ("instruction", "output"): _from_instruction,
    ("prompt", "completion"): _from_prompt,
    ("texts",): _from_texts,
}
"""Columns of a form -> its messages, and how many of the last turns of the model are learned; None for all."""


def _turns(pairs: list[Any]) -> list[Message]:
    return [
        {"role": role, "content": as_text(text)}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _messages(given: Any) -> list[Message]:
    """Messages of role and content, whatever they are called."""
    if not isinstance(given, list) or len(given) > MAX_MESSAGES:
        kind = f"a list of {len(given)}" if isinstance(given, list) else f"{given!r:.100}"
        raise InputError(f"messages must be a list of at most {MAX_MESSAGES}, and are {kind}.")
    messages = []
    for number, message in enumerate(given):
        try:
            messages.append(_message(message))
        except InputError as error:
            raise InputError(f"message {number}: {error}") from error
    return messages


def _message(given: Any) -> Message:
    if not isinstance(given, Mapping):
        raise InputError(f"it must be a dictionary, and is {given!r:.100}.")
    who, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(who, str) or who.lower() not in ROLES:
        raise InputError(f"its role is {who!r:.60}, and must be one of {', '.join(ROLES)}.")
    if given.get("weight", 1) != 1:
        raise InputError("it has a weight of its own, and turns have none: set last_turn_only, or leave it out.")
    message = {name: v for name, v in given.items() if name not in ("role", "from", "content", "value", "weight")}
    message["role"] = ROLES[who.lower()]
    calls = message.get("tool_calls")
    if who == "function_call":
        calls, content = [{"type": "function", "function": _json(content)}], None
    if calls:
        message["tool_calls"] = _calls(calls)
    if content is None and not calls and "tool_responses" not in message:
        raise InputError("it has no content.")
    if isinstance(content, list) and len(content) > MAX_PARTS:
        raise InputError(f"{len(content)} parts are refused: it may have {MAX_PARTS}.")
    if content is not None and not isinstance(content, str | list):
        raise InputError(f"its content must be a text or a list of parts, and is {content!r:.100}.")
    return message if content is None else message | {"content": content}


def _calls(calls: Any) -> list[Any]:
    """Calls of tools, the arguments of which may be JSON in a text."""
    is_known = isinstance(calls, list) and all(
        isinstance(call, Mapping) and isinstance(call.get("function"), Mapping) for call in calls
    )
    if not is_known:
        raise InputError(f'tool_calls must be a list of {{"function": {{...}}}}, and are {calls!r:.100}.')
    return [
        {**call, "function": {**call["function"], "arguments": _json(call["function"].get("arguments", {}))}}
        for call in calls
    ]


def _json(value: Any) -> Any:
    """What a text holds as JSON; anything else is already that."""
    if not isinstance(value, str):
        return value
    try:
        return _without_nulls(json.loads(value))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{value[:60]!r} is not JSON ({type(error).__name__}).") from error
