"""The sandbox in which chat templates run, Jinja programs in files that nobody vouches for."""

import datetime
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MAX_CHARACTERS = 1 << 24
"""A template, or a conversation, that is longer is refused."""

SPAN, SPAN_END = "\ufdd2", "\ufdd3"
"""Around what a generation block writes: characters that Unicode keeps out of texts."""

_MAX_BITS = 1 << 16
"""Of a number that a template computes."""


class _GenerationBlocks(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} around what the model writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{SPAN}{caller()}{SPAN_END}"


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

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._is_safe: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Jinja decides by the type and the name, but takes longer for it than for all the rest.
        key = type(obj), str(attr)
        is_safe = self._is_safe.get(key)
        if is_safe is None:
            is_safe = super().is_safe_attribute(obj, attr, value)
            if len(self._is_safe) < 1024:
                self._is_safe[key] = is_safe
        return is_safe

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


def make_environment() -> jinja2.Environment:
    """Where templates are compiled: they see the conversation alone, and mark what the model writes."""
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
