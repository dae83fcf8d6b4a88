"""Conversations to tokens, by the chat template of a checkpoint, and which of the tokens the model is to write.

A template is a Jinja program in a file that nobody vouches for: it runs in a sandbox that shows it nothing but the
conversation, as plain data. What users and tools say is text: the name of a special token in it is plain characters,
so that nobody can end a turn, or begin the model's, by writing so.

Source: transformers 5.24, `utils/chat_template_utils.py`; the templates of the released Gemma 4 checkpoints.
"""

import bisect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
import numpy as np

from gemma4_jax.errors import InputError
from gemma4_jax.sandbox import MAX_CHARACTERS, SPAN, SPAN_END, make_environment
from gemma4_jax.tokenizer import NAMES, Tokenizer

# Characters that Unicode keeps out of texts mark what is to be found again in a rendered one.
_PLAIN, _PLAIN_END = "\ufdd0", "\ufdd1"
_PLAIN_NAME = re.compile(f"{_PLAIN}([^{_PLAIN}{_PLAIN_END}]*){_PLAIN_END}|[{_PLAIN}{_PLAIN_END}]")
_MARKS = re.compile(f"[{_PLAIN}{_PLAIN_END}{SPAN}{SPAN_END}]")

_TURN, _TURN_END = "<|turn>model\n", "<turn|>"
_RESPONSE, _RESPONSE_END = "<|tool_response>", "<tool_response|>"

_REASONING = ("reasoning_content", "thinking", "reasoning")


def template_source(folder: Path) -> str | None:
    """The chat template beside a tokenizer.json: chat_template.jinja, else what a file of JSON says; None without one.

    Raises:
      InputError: a file cannot be read.
    """
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                return file.read(MAX_CHARACTERS + 1)
        for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
            content: Any = json.loads(path.read_text("utf-8")) if path.is_file() else None
            if isinstance(content, dict) and isinstance(content.get("chat_template"), str):
                return content["chat_template"]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON
        raise InputError(f"{path} cannot be read: {error}.") from error
    return None


class ChatTemplate:
    """The chat format of a checkpoint.

    Args of the constructor:
      source: the content of chat_template.jinja.
      tokenizer: of the same checkpoint.
    Raises:
      InputError: the source is not a template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        if len(source) > MAX_CHARACTERS:
            raise InputError(f"the chat template has {len(source)} characters: at most {MAX_CHARACTERS} are read.")
        self._tokenizer = tokenizer
        # A tokenizer reads a token that is not flagged as special in every text, so its name is cut in two instead.
        cut = {name for name in tokenizer.other_tokens if len(name) > 1 and name.strip() and name in source}
        names = sorted((*tokenizer.special_tokens, *cut), key=len, reverse=True)
        patterns = [
            re.escape(name[0]) + f"(?={re.escape(name[1:])})" if name in cut else re.escape(name) for name in names
        ]
        self._special_token = re.compile("|".join(patterns))
        self._beginnings = {name[:stop] for name in names for stop in range(1, len(name))}
        self._longest = max(map(len, names))
        self._named_tokens = {name: token for name, token in NAMES.items() if token in tokenizer.special_tokens}
        environment = make_environment()
        try:
            self._template = environment.from_string(source)
            self._marks_spans = any(
                isinstance(node.call, jinja2.nodes.Call) and isinstance(node.call.node, jinja2.nodes.ExtensionAttribute)
                for node in environment.parse(source).find_all(jinja2.nodes.CallBlock)
            )
        except (jinja2.TemplateError, RecursionError) as error:
            raise InputError(f"the chat template cannot be read: {_sentence(error)}") from error

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, as transformers' `apply_chat_template` gives them before it expands images.

        The model's part is what the template puts between {% generation %} and {% endgeneration %}; without them, as
        in the released templates, everything from behind "<|turn>model" and the line break to "<turn|>" and with it,
        but for what tools respond: the model writes "<|tool_response>", and what follows comes from outside.

        Args:
          messages: each with "role", and "content" that is text or a list of {"type": "text", "text": ...} and
            {"type": "image"}; also "tool_calls" and whatever else the template reads.
          tools: JSON schemas of functions.
          add_generation_prompt: end with the beginning of the model's turn.
          variables: of the template, such as `enable_thinking`.
        Returns:
          (token ids, for each whether it is the model's part).
        Raises:
          InputError: the messages are no conversation or no text, the template fails on them, or marks no part of the
            model.
        """
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise InputError("tools must be a list of JSON schemas of functions, each a dictionary.")
        try:
            chat = [self._prepare(message, i) for i, message in enumerate(messages)]
            given = {
                **({"documents": None} | self._named_tokens | self._mark(_plain(variables))),
                "messages": chat,
                "tools": None if tools is None else self._mark(_plain(list(tools))),
                "add_generation_prompt": add_generation_prompt,
            }
        except RecursionError as error:
            raise InputError("a conversation is nested too deeply to be read.") from error
        if not chat:
            raise InputError("a conversation has no messages: give at least one.")
        text = self._render(given)
        if self._marks_spans:
            text, spans = _take_spans(text)
        else:
            spans = _model_turns(text, is_open=not add_generation_prompt)
        if not spans and not add_generation_prompt and any(message["role"] == "assistant" for message in chat):
            raise InputError(
                "the chat template shows no turn of the model: it must write '<|turn>model' and '<turn|>' around it or "
                "{% generation %} and {% endgeneration %}."
            )
        return self._tokenize(text, spans)

    def _prepare(self, message: Any, index: int) -> dict[str, Any]:
        """A message as the template sees it."""
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index} must be a dictionary with a 'role', and is {message!r:.100}.")
        plain = {name: value for name, value in _plain(message).items() if value is not None}
        # In what the assistant says a template may look for a thought channel, so its special tokens are left.
        said = ("content", *_REASONING) if plain["role"] == "assistant" else ()
        plain = {self._mark(name): value if name in said else self._mark(value) for name, value in plain.items()}
        reasoning = next((plain[name] for name in _REASONING if name in plain), None)
        return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}

    def _mark(self, value: Any, *, is_followed: bool = False) -> Any:
        """Plain data, with every name of a special token between marks.

        Args:
          value: from `_plain`.
          is_followed: whether a template may join more of such data to it, so that what begins a name at its end is
            marked too.
        """
        if isinstance(value, str):
            marked = self._special_token.sub(_between_marks, value)
            return self._mark_end(marked) if is_followed else marked
        if isinstance(value, dict):
            return {self._mark(name): self._mark(item, is_followed=is_followed) for name, item in value.items()}
        if isinstance(value, list):
            last = len(value) - 1
            return [self._mark(item, is_followed=is_followed or i < last) for i, item in enumerate(value)]
        return value

    def _mark_end(self, text: str) -> str:
        """The text with marks around the beginning of a name that it ends in, when a template has trimmed it."""
        trimmed = text.rstrip()
        for start in range(max(0, len(trimmed) - self._longest), len(trimmed)):
            if trimmed[start:] in self._beginnings:
                return f"{trimmed[:start]}{_PLAIN}{trimmed[start:]}{_PLAIN_END}{text[len(trimmed) :]}"
        return text

    def _render(self, variables: dict[str, Any]) -> str:
        try:
            return self._write(variables)
        except InputError:
            raise
        except Exception as error:  # a template is a program, and fails as programs do
            number = self._first_that_fails(variables)
            role = variables["messages"][number]["role"]
            raise InputError(
                f"the chat template cannot write message {number} ({role:.60}) of this conversation: {_sentence(error)}"
            ) from error

    def _write(self, variables: dict[str, Any]) -> str:
        blocks, length = [], 0
        for block in self._template.generate(variables):
            blocks.append(block)
            length += len(block)
            if length > MAX_CHARACTERS:
                raise InputError(f"the chat template writes more than {MAX_CHARACTERS} characters: it is no template.")
        return "".join(blocks)

    def _first_that_fails(self, variables: dict[str, Any]) -> int:
        """The message that ends the shortest conversation that the template cannot write: most fail from there on."""
        messages = variables["messages"]

        def fails(number: int) -> bool:
            try:
                self._write({**variables, "messages": messages[: number + 1]})
            except Exception:
                return True
            return False

        return bisect.bisect_left(range(len(messages) - 1), True, key=fails)

    def _tokenize(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Tokens of a rendered chat, and for each whether any of its characters is in a span.

        Args:
          text: names of special tokens between marks are plain characters.
          spans: [start, stop) in the text, in order and apart.
        """
        ids: list[int] = []
        begins: list[np.ndarray] = []
        ends: list[np.ndarray] = []

        def add(start: int, stop: int, *, reads_special_tokens: bool) -> None:
            encode = self._tokenizer.encode_with_ends
            piece_ids, piece_ends = encode(text[start:stop], reads_special_tokens=reads_special_tokens)
            ids.extend(piece_ids)
            ends.append(piece_ends + start)
            begins.append(np.concatenate(([start], ends[-1]))[:-1])

        end = 0
        for mark in _PLAIN_NAME.finditer(text):
            add(end, mark.start(), reads_special_tokens=True)
            if mark[1]:
                add(*mark.span(1), reads_special_tokens=False)
            end = mark.end()
        add(end, len(text), reads_special_tokens=True)
        return ids, _is_within(np.concatenate(begins), np.concatenate(ends), spans).tolist()


def _is_within(begins: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """[n] bool: whether any character of a token is in a span.

    Args:
      begins, ends: [n] ascending, where each token begins and ends; of the bytes of one character, where each is a
        token, all end with it, and the first begins it.
      spans: [start, stop) in order and apart.
    """
    mask = np.zeros(len(ends), bool)
    starts, stops = np.array(spans, int).reshape(-1, 2).T
    firsts = np.searchsorted(ends, starts, side="right")
    lasts = np.maximum(np.searchsorted(begins, stops), np.searchsorted(ends, stops, side="right"))
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        mask[first:last] = True
    return mask


def _between_marks(name: re.Match[str]) -> str:
    return f"{_PLAIN}{name[0]}{_PLAIN_END}"


def _take_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of generation blocks, and where these were."""
    parts = re.split(f"([{SPAN}{SPAN_END}])", text)
    spans, starts, length = [], [], 0
    for part in parts:
        if part == SPAN:
            starts.append(length)
        elif part == SPAN_END:
            if not starts:
                raise InputError("the chat template writes U+FDD3, which stands for the end of a generation block.")
            start = starts.pop()
            if not starts:  # one inside of another is in that one's span
                spans.append((start, length))
        else:
            length += len(part)
    return "".join(part for part in parts if part not in (SPAN, SPAN_END)), spans


def _model_turns(text: str, *, is_open: bool) -> list[tuple[int, int]]:
    """What the model writes in a rendered chat of Gemma 4: its turns, without what tools respond in them.

    Args:
      text: rendered.
      is_open: whether a turn that the text ends in is a conversation's last, and not the beginning of what is to come.
    """
    spans = []
    end = 0
    while (turn := _find(text, _TURN, end)) >= 0:
        start = turn + len(_TURN)
        stop = _find(text, _TURN_END, start)
        if stop < 0 and not is_open:
            break
        end = len(text) if stop < 0 else stop + len(_TURN_END)
        while (response := _find(text, _RESPONSE, start, end)) >= 0:
            spans.append((start, response + len(_RESPONSE)))
            stop = _find(text, _RESPONSE_END, response, end)
            start = end if stop < 0 else stop + len(_RESPONSE_END)
        spans.append((start, end))
    return [(start, stop) for start, stop in spans if start < stop]


def _find(text: str, name: str, start: int, stop: int | None = None) -> int:
    """Where a special token begins in a rendered text, -1 if nowhere: not where somebody only says its name."""
    found = text.find(name, start, stop)
    while found > 0 and text[found - 1] == _PLAIN:
        found = text.find(name, found + 1, stop)
    return found


def _plain(value: Any) -> Any:
    """A value rebuilt of JSON's types, with nothing for a template to call; what has no such form becomes its name."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return value if type(value) is str and value.isascii() else _MARKS.sub("", str.__str__(value))
    if isinstance(value, Mapping):
        return {str(_plain(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.item()) if isinstance(value, np.generic) else f"<{type(value).__name__}>"


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text.rstrip('.')}{f' (line {line})' if line else ''}."
