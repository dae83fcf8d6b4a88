"""The sandbox in which chat templates run, Jinja programs in files that nobody vouches for."""

import datetime
import functools
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from jinja2.runtime import Context, LoopContext, Macro

from gemma4_jax.errors import InputError

MAX_CHARACTERS = 1 << 24
"""A template, or a conversation, that is longer is refused."""

SPAN, SPAN_END = "\ufdd2", "\ufdd3"
"""Around what a generation block writes: characters that Unicode keeps out of texts."""

_MAX_BITS = 1 << 16
"""Of a number that a template computes."""

_MAX_STEPS = 1 << 25
"""Rounds of loops, and calls, in one rendering: more than 4,096 messages that are each compared with all."""

_DICT_ATTRIBUTES = frozenset(dir(dict))
_TEXT_METHODS = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))
"""Of a text, those that Jinja hands out as they are."""


class _GenerationBlocks(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} around what the model writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{SPAN}{caller()}{SPAN_END}"


class _Context(Context):
    """What a rendering knows: variables, and how many steps it has taken."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = [0]  # a list, which contexts derived from this one share

    def derived(self, locals: dict[str, Any] | None = None) -> "_Context":
        context = super().derived(locals)
        assert isinstance(context, _Context)
        context.steps = self.steps
        return context

    def count(self, number: int) -> None:
        """Counts steps, so that no loop and no recursion goes on for ever.

        Raises:
          InputError: there are too many.
        """
        self.steps[0] += number
        if self.steps[0] > _MAX_STEPS:
            raise InputError(f"the chat template takes more than {_MAX_STEPS} steps: it is no template.")


@jinja2.pass_context
def _counted(context: _Context, items: Any) -> Any:
    """What a loop goes through, with its rounds counted."""
    if not hasattr(items, "__len__"):
        return _counted_one_by_one(context, items)
    if len(items) > 1:  # else nothing is done twice
        context.count(len(items))
    return items


def _counted_one_by_one(context: _Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        context.count(1)
        yield item


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that could reach what is inside of Python."""

    __getattribute__ = object.__getattribute__  # Jinja's is written in Python, and slow

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"{name!r} is no name for an attribute of a namespace")
        self.__dict__[name] = value

    def __repr__(self) -> str:
        return f"<Namespace {self.__dict__!r}>"


@functools.lru_cache(maxsize=64)
def _undefined(name: str) -> jinja2.Undefined:
    """What a dictionary without the name has under it."""
    return jinja2.Undefined(None, {}, name)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without loops that do not end and products that fill the memory.

    What templates do at every message has a short way, to what Jinja would give after its checks: these depend on
    types and names alone, and are known beforehand of texts, dictionaries, macros and namespaces. All else is checked.
    """

    context_class = _Context
    intercepted_binops = frozenset(("*", "**"))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str:
            if argument in obj:
                return obj[argument]
            if argument not in _DICT_ATTRIBUTES:
                return _undefined(argument)
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is str and attribute in _TEXT_METHODS:
            return getattr(obj, attribute)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else _undefined(attribute)
        if kind is _Namespace and attribute in obj.__dict__:
            return obj.__dict__[attribute]
        return super().getattr(obj, attribute)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        kind = type(__obj)
        if __obj is not _Namespace and (kind is not types.BuiltinMethodType or type(__obj.__self__) is not str):
            __context.count(1)
            if kind is not Macro:
                if kind is LoopContext:  # a recursive loop's next level
                    args = tuple(_counted(__context, items) for items in args)
                return super().call(__context, __obj, *args, **kwargs)
            args = (__context.eval_ctx, *args)
        kwargs.pop("_loop_vars", None)  # from the compiler, for functions that ask for the context
        kwargs.pop("_block_vars", None)
        return __obj(*args, **kwargs)

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


def compile_template(source: str, variables: Mapping[str, str]) -> tuple[jinja2.Template, bool]:
    """A template, which sees the conversation alone, and whether it marks what the model writes.

    Args:
      source: of the template.
      variables: that it has in every rendering.
    Raises:
      jinja2.TemplateError, RecursionError: the source is no template.
    """
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.globals.clear()
    environment.globals |= {
        "range": jinja2.sandbox.safe_range,
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.filters |= {"tojson": _to_json, "counted": _counted}
    tree = environment.parse(source)
    for loop in list(tree.find_all(jinja2.nodes.For)):  # a list, for the tree changes on the way
        loop.iter = jinja2.nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
    marks_spans = any(
        isinstance(node.call, jinja2.nodes.Call) and isinstance(node.call.node, jinja2.nodes.ExtensionAttribute)
        for node in tree.find_all(jinja2.nodes.CallBlock)
    )
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, {**environment.globals, **variables}), marks_spans


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
