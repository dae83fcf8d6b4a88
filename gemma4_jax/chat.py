"""Conversations to tokens, by the chat template of a checkpoint, and which of the tokens the model is to write.

A template is a Jinja program in a file that nobody vouches for: it runs in a sandbox that shows it nothing but the
conversation, as plain data. What users and tools say is text: the name of a special token in it is plain characters,
so that nobody can end a turn, or begin the model's, by writing so.

Source: transformers 5.24, `utils/chat_template_utils.py`; the templates of the released Gemma 4 checkpoints.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from gemma4_jax.errors import InputError
from gemma4_jax.sandbox import MAX_CHARACTERS, SPAN, SPAN_END, compile_template
from gemma4_jax.tokenizer import NAMES, Tokenizer

# Characters that Unicode keeps out of texts mark what is to be found again in a rendered one.
_PLAIN, _PLAIN_END = "\ufdd0", "\ufdd1"
_PLAIN_NAME = re.compile(f"{_PLAIN}([^{_PLAIN}{_PLAIN_END}]*){_PLAIN_END}|[{_PLAIN}{_PLAIN_END}]")
_PLAIN_MARK = re.compile(f"[{_PLAIN}{_PLAIN_END}]")
_MARKS = re.compile(f"[{_PLAIN}{_PLAIN_END}{SPAN}{SPAN_END}]")

_TURN, _TURN_END = "<|turn>model\n", "<turn|>"
_RESPONSE, _RESPONSE_END = "<|tool_response>", "<tool_response|>"

_VIDEO = re.compile(rf"(?<!{_PLAIN})<\|video\|>")

_MAPPINGS = (dict, Mapping)  # of a dict the latter alone would take eight times as long to say so
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
        self._firsts = {name[0] for name in names}
        self._beginnings = {name[:stop] for name in names for stop in range(1, len(name))}
        self._longest = max(map(len, names))
        named = {name: token for name, token in NAMES.items() if token in tokenizer.special_tokens}
        try:
            self._template, self._marks_spans = compile_template(source, named)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InputError(f"the chat template cannot be read: {_sentence(error)}") from error

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        videos: Sequence[Sequence[str]] | None = None,
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
          videos: of each {"type": "video"} the times of its frames, each of which becomes "TIME <|image|>", where
            the processor of the reference puts a placeholder of its own. None leaves <|video|> as it is.
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
                "documents": None,
                **self._plain(variables),
                "messages": chat,
                "tools": None if tools is None else self._plain(list(tools)),
                "add_generation_prompt": add_generation_prompt,
            }
        except RecursionError as error:
            raise InputError("a conversation is nested too deeply to be read.") from error
        if not chat:
            raise InputError("a conversation has no messages: give at least one.")
        text = self._render(given)
        if videos is not None:
            text = _write_frames(text, videos)
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
        if not isinstance(message, _MAPPINGS) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index} must be a dictionary with a 'role', and is {message!r:.100}.")
        plain = {self._plain(name): value for name, value in message.items() if value is not None}
        # In what the assistant says a template may look for a thought channel, so its special tokens are left.
        said = ("content", *_REASONING) if self._plain(plain["role"]) == "assistant" else ()
        plain = {name: self._plain(value, marks=name not in said) for name, value in plain.items()}
        reasoning = next((plain[name] for name in _REASONING if name in plain), None)
        return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}

    def _plain(self, value: Any, *, marks: bool = True, is_followed: bool = False) -> Any:
        """A value rebuilt of JSON's types, with nothing for a template to call; what has no such form becomes its name.

        Args:
          value: anything.
          marks: whether every name of a special token in its texts gets marks around it.
          is_followed: whether a template may join more of such data to it, so that what begins a name at its end is
            marked too.
        """
        kind = type(value)
        if isinstance(value, str):
            text = value if kind is str and value.isascii() else _MARKS.sub("", str.__str__(value))
            return self._mark(text, is_followed=is_followed) if marks else text
        if value is None or kind in (bool, int, float):
            return value
        if isinstance(value, _MAPPINGS):
            return {
                str(self._plain(name, marks=marks)): self._plain(item, marks=marks, is_followed=is_followed)
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            last = len(value) - 1
            return [self._plain(item, marks=marks, is_followed=is_followed or i < last) for i, item in enumerate(value)]
        if isinstance(value, np.generic):
            return self._plain(value.item(), marks=marks, is_followed=is_followed)
        return f"<{kind.__name__}>"

    def _mark(self, text: str, *, is_followed: bool) -> str:
        """The text with marks around every name of a special token."""
        for first in self._firsts:
            if first in text:  # to look for the names takes longer
                text = self._special_token.sub(_between_marks, text)
                break
        return self._mark_end(text) if is_followed else text

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
            role = str(variables["messages"][number]["role"])
            raise InputError(
                f"the chat template cannot write message {number} ({role:.60}) of this conversation: {_sentence(error)}"
            ) from error

    def _write(self, variables: dict[str, Any]) -> str:
        blocks, length = [], 0
        for block in self._template.root_render_func(self._template.new_context(variables)):
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

        return bisect_left(range(len(messages) - 1), True, key=fails)

    def _tokenize(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Tokens of a rendered chat, and for each whether any of its characters is in a span.

        Args:
          text: names of special tokens between marks are plain characters.
          spans: [start, stop) in the text, in order and apart.
        """
        encode = self._tokenizer.encode_with_ends
        if _PLAIN not in text and _PLAIN_END not in text:
            ids, ends = encode(text, reads_special_tokens=True)
            return ids, _is_within(ends, spans)
        marks = [mark.start() for mark in _PLAIN_MARK.finditer(text)]
        spans = [(start - bisect_left(marks, start), stop - bisect_left(marks, stop)) for start, stop in spans]
        ids, ends = [], []
        for i, piece in enumerate(_PLAIN_NAME.split(text)):
            if piece:  # every other is a name, or None where only one of its marks is
                piece_ids, piece_ends = encode(piece, reads_special_tokens=i % 2 == 0)
                begin = ends[-1] if ends else 0
                ids += piece_ids
                ends += [begin + end for end in piece_ends]
        return ids, _is_within(ends, spans)


def _is_within(ends: list[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether any character of a token is in a span.

    Args:
      ends: ascending, where each token ends and the next begins; of the bytes of one character, where each is a token,
        all end with it, and the first begins it.
      spans: [start, stop) in order and apart.
    """
    mask = [False] * len(ends)
    begins = [0, *ends][:-1]
    for start, stop in spans:
        first = bisect_right(ends, start)
        last = max(bisect_left(begins, stop), bisect_right(ends, stop))
        mask[first:last] = [True] * (last - first)
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


def _write_frames(text: str, videos: Sequence[Sequence[str]]) -> str:
    """A rendered text with the frames of the videos in their places, as `Gemma4Processor.replace_video_token` has them.

    Raises:
      InputError: there are more places, or fewer.
    """
    places = list(_VIDEO.finditer(text))
    if len(places) != len(videos):
        raise InputError(f"the chat template writes {len(places)} places for videos, and {len(videos)} are given.")
    written = iter(" ".join(f"{time} <|image|>" for time in times) for times in videos)
    return _VIDEO.sub(lambda _: next(written), text)


def _find(text: str, name: str, start: int, stop: int | None = None) -> int:
    """Where a special token begins in a rendered text, -1 if nowhere: not where somebody only says its name."""
    found = text.find(name, start, stop)
    while found > 0 and text[found - 1] == _PLAIN:
        found = text.find(name, found + 1, stop)
    return found


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text.rstrip('.')}{f' (line {line})' if line else ''}."
