"""Two answers to one prompt, of which one is preferred:

    {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}
    {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}
    {"chosen": TEXT or MESSAGES, "rejected": the same}, where what both begin with is the prompt

Messages are those of `chat`, with images, sounds, `system` and `tools` beside them. A prompt that is a text beside
answers in messages is not read: these begin with it. Texts are texts, not turns; only with images or sounds beside them
is the prompt what a user says, and an answer what the model says.

Source: `extract_prompt` and `maybe_extract_prompt` of TRL 1.16, data_utils.py.
"""

from collections.abc import Sequence
from typing import Any

from gemma4_jax.data.document import Document, Pair, Text
from gemma4_jax.data.tasks.chat import chat
from gemma4_jax.data.tasks.text import as_text
from gemma4_jax.errors import InputError


def preference(
    chosen: Any,
    rejected: Any,
    prompt: Any = None,
    image: Any = None,
    images: Any = None,
    audio: Any = None,
    audios: Any = None,
    system: Any = None,
    tools: Any = None,
) -> Pair:
    """A pair of an answer that is preferred and one that is not; see this module's page for the columns.

    Raises:
      InputError: the answers are the same, are not of one kind, or are none of it.
    """
    answers = [chosen, rejected]
    if not all(isinstance(answer, list) for answer in answers) and any(isinstance(a, list) for a in answers):
        raise InputError("chosen and rejected must both be texts, or both lists of messages.")
    if chosen == rejected:
        raise InputError("chosen and rejected are the same: nothing is to be learned of them.")
    is_chat = isinstance(chosen, list)
    if not is_chat:
        answers = [as_text(answer) for answer in answers]
    before: Any
    is_explicit = isinstance(prompt, list) if is_chat else prompt is not None
    if is_explicit:
        before = prompt if is_chat else as_text(prompt)
    else:
        length = _shared(*answers)
        before, answers = answers[0][:length], [answer[length:] for answer in answers]
    beside = {"image": image, "images": images, "audio": audio, "audios": audios, "system": system, "tools": tools}
    if is_chat:
        return _pair_of_chats(before, answers, beside)
    if any(beside[name] for name in ("image", "images", "audio", "audios")):
        turns = [[{"role": "assistant", "content": answer}] for answer in answers]
        return _pair_of_chats([{"role": "user", "content": before}], turns, beside)
    better, worse = (Document((Text(before + answer),)) for answer in answers)
    return Pair(better, worse, len(before))


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How much two answers begin with in common: less than all of either, and no space that ends it."""
    length = min(len(chosen), len(rejected))
    for i in range(length):
        if chosen[i] != rejected[i]:
            return i - 1 if i and chosen[i - 1] == " " else i
    return max(0, length - 1)


def _pair_of_chats(prompt: list[Any], answers: list[list[Any]], beside: dict[str, Any]) -> Pair:
    better, worse = (chat(messages=[*prompt, *answer], **beside) for answer in answers)
    assert better.conversation is not None
    # The answer is as long as it was; before the prompt may stand a system message of another column.
    return Pair(better, worse, len(better.conversation.messages) - len(answers[0]))
