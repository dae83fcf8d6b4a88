"""Conversations to tokens, by the chat template of a checkpoint, and which of the tokens the model is to write.

A template is a Jinja program in a file that nobody vouches for: it runs in a sandbox that shows it nothing but the
conversation, as plain data. What users and tools say is text: the name of a special token in it is plain characters,
so that nobody can end a turn, or begin the model's, by writing so.

Source: transformers 5.24, `utils/chat_template_utils.py`; the templates of the released Gemma 4 checkpoints.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import numpy as np

from gemma4_jax.errors import InputError
from gemma4_jax.tokenizer import NAMES, Tokenizer

MAX_CHARACTERS = 1 << 24
"""A template, or a conversation, that is longer is refused."""

_MAX_BITS = 1 << 16
"""Of a number that a template computes."""

# Characters that Unicode keeps out of texts mark what is to be found again in a rendered one.
_PLAIN, _PLAIN_END, _SPAN, _SPAN_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_PLAIN_NAME = re.compile(f"{_PLAIN}([^{_PLAIN}{_PLAIN_END}]*){_PLAIN_END}|[{_PLAIN}{_PLAIN_END}]")
_MARKS = re.compile(f"[{_PLAIN}{_PLAIN_END}{_SPAN}{_SPAN_END}]")

_TURN = re.compile(rf"(?<!{_PLAIN})<\|turn>model\n(.*?)((?<!{_PLAIN})<turn\|>|\Z)", re.DOTALL)
_TOOL_RESPONSE = re.compile(rf"(?<!{_PLAIN})<\|tool_response>(.*?)(?:(?<!{_PLAIN})<tool_response\|>|\Z)", re.DOTALL)

_REASONING = ("reasoning_content", "thinking", "reasoning")


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
        environment = _environment()
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
            marked = self._special_token.sub(f"{_PLAIN}\\g<0>{_PLAIN_END}", value)
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
        blocks, length = [], 0
        try:
            for block in self._template.generate(variables):
                blocks.append(block)
                length += len(block)
                if length > MAX_CHARACTERS:
                    raise InputError(
                        f"the chat template writes more than {MAX_CHARACTERS} characters: it is no template."
                    )
        except InputError:
            raise
        except Exception as error:  # a template is a program, and fails as programs do
            raise InputError(f"the chat template cannot write this conversation: {_sentence(error)}") from error
        return "".join(blocks)

    def _tokenize(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        is_ours = np.zeros(len(text) + 1, bool)
        for start, stop in spans:
            is_ours[start:stop] = True
        ids: list[int] = []
        mask: list[bool] = []

        def add(start: int, stop: int, *, reads_special_tokens: bool) -> None:
            encode = self._tokenizer.encode_with_offsets
            piece_ids, offsets = encode(text[start:stop], reads_special_tokens=reads_special_tokens)
            ids.extend(piece_ids)
            mask.extend(bool(is_ours[start + first : start + last].any()) for first, last in offsets)

        end = 0
        for mark in _PLAIN_NAME.finditer(text):
            add(end, mark.start(), reads_special_tokens=True)
            if mark[1]:
                add(*mark.span(1), reads_special_tokens=False)
            end = mark.end()
        add(end, len(text), reads_special_tokens=True)
        return ids, mask


def _take_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of generation blocks, and where these were."""
    parts = re.split(f"([{_SPAN}{_SPAN_END}])", text)
    spans, starts, length = [], [], 0
    for part in parts:
        if part == _SPAN:
            starts.append(length)
        elif part == _SPAN_END:
            if not starts:
                raise InputError("the chat template writes U+FDD3, which stands for the end of a generation block.")
            spans.append((starts.pop(), length))
        else:
            length += len(part)
    return "".join(part for part in parts if part not in (_SPAN, _SPAN_END)), spans


def _model_turns(text: str, *, is_open: bool) -> list[tuple[int, int]]:
    """What the model writes in a rendered chat of Gemma 4: its turns, without what tools respond in them.

    Args:
      text: rendered.
      is_open: whether a turn that the text ends in is a conversation's last, and not the beginning of what is to come.
    """
    spans = []
    for turn in _TURN.finditer(text):
        if not turn[2] and not is_open:
            continue
        start, stop = turn.start(1), turn.end()
        for response in _TOOL_RESPONSE.finditer(text, start, stop):
            spans.append((start, response.start(1)))
            start = response.end()
        spans.append((start, stop))
    return [(start, stop) for start, stop in spans if start < stop]


def _plain(value: Any) -> Any:
    """A value rebuilt of JSON's types, with nothing for a template to call; what has no such form becomes its name."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return _MARKS.sub("", str.__str__(value))
    if isinstance(value, Mapping):
        return {str(_plain(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.item()) if isinstance(value, np.generic) else f"<{type(value).__name__}>"


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text.rstrip('.')}{f' (line {line})' if line else ''}."


class _GenerationBlocks(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} around what the model writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_SPAN}{caller()}{_SPAN_END}"


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that could reach what is inside of Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.sandbox.SecurityError(f"{name!r} is no name for an attribute of a namespace")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without products that fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        is_large = False
        if isinstance(left, int) and isinstance(right, int):
            is_large = left.bit_length() * (right if operator == "**" else 1) + right.bit_length() > _MAX_BITS
        elif isinstance(left, int) or isinstance(right, int):
            count, items = (left, right) if isinstance(left, int) else (right, left)
            is_large = isinstance(items, str | list | tuple) and len(items) * count > MAX_CHARACTERS
        if is_large:
            raise jinja2.sandbox.SecurityError(f"the result of {operator} is too large for a template")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    safe = {"range": environment.globals["range"], "namespace": _Namespace, "raise_exception": raise_exception}
    environment.globals.clear()
    environment.globals.update(safe, strftime_now=lambda form: datetime.datetime.now().strftime(form))
    environment.filters["tojson"] = tojson
    return environment
