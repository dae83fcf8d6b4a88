"""The sandbox of chat templates: its short ways lead where Jinja's own do, and templates of bad intent nowhere."""

import contextlib

import jinja2
import jinja2.sandbox
import pytest

from gemma4_jax import sandbox
from gemma4_jax.errors import InputError
from gemma4_jax.sandbox import compile_template

DATA = {
    "text": "a b",
    "chat": [{"role": "user", "content": "Hi.", "items": 1}],
    "number": 3,
}


def render(source: str) -> str:
    template, _ = compile_template(source, {})
    return "".join(template.root_render_func(template.new_context(DATA)))


def values(environment: jinja2.Environment) -> list:
    """One of each kind that templates handle."""
    template = environment.from_string(
        "{% macro f() %}{% endmacro %}{% for x in [1] %}{{ give(f, loop, range, range(3), 'a'|safe) }}{% endfor %}"
    )
    given: list = []
    list(template.generate(give=lambda *items: given.extend(items)))
    return ["a b", {"x": 1, "items": 2, "_y": 3}, {}, ["a"], ("a",), 3, 2.5, True, None, "a".split, *given]


def kind_of(result: object) -> object:
    """What tells two results apart that were made twice."""
    if isinstance(result, jinja2.Undefined):
        return result._undefined_message, result._undefined_exception
    return type(result), getattr(result, "__name__", None) or str(result).split(" at 0x")[0]


def test_short_ways_lead_where_jinjas_own_do():
    """For every kind of value, all names that Python gives it, and some that it does not."""
    ours = compile_template("", {})[0].environment
    theirs = jinja2.sandbox.ImmutableSandboxedEnvironment()
    is_any_safe = False
    for mine, other in zip(values(ours), values(theirs), strict=True):
        for name in {*dir(mine), "x", "_y", "absent", "__absent__", "func_globals", jinja2.filters.Markup("upper")}:
            for get in ("getattr", "getitem"):
                result, expected = getattr(ours, get)(mine, name), getattr(theirs, get)(other, name)
                assert kind_of(result) == kind_of(expected), (mine, name, get)
                is_any_safe |= not isinstance(result, jinja2.Undefined)
        for key in (0, -1, 7, None, (), [], slice(1)):
            assert kind_of(ours.getitem(mine, key)) == kind_of(theirs.getitem(other, key)), (mine, key)
    assert is_any_safe


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''['__class__'] }}",
        "{{ chat['__class__'].__mro__ }}",
        "{{ ''|attr('__class__') }}{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ [[]]|map(attribute='__class__')|first }}",
        "{{ ['']|map('attr', '__class__')|first }}",
        "{{ [chat]|selectattr('__class__')|list|length or '' }}",
        "{{ '{0.__class__}'.format(chat) }}",
        "{{ '{0[0].__class__.__mro__}'.format(chat) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ ['{0.__class__}']|map('attr', 'format')|first|attr('__self__') }}",
        "{{ 'x'.format.__globals__ }}",
        "{{ 'x'.split.__self__ }}",
        "{{ range.__globals__ }}{{ raise_exception.__globals__ }}{{ strftime_now.__code__ }}",
        "{{ namespace.__init__ }}{{ namespace.mro }}",
        "{{ namespace(a=1).__dict__ }}{{ namespace(a=1)['__dict__'] }}{{ namespace(a=1)|attr('__init__') }}",
        "{% macro f() %}{% endmacro %}{{ f._func }}{{ f._environment }}{{ f.__call__ }}",
        "{% for m in chat %}{{ loop._iterator }}{{ loop.__class__ }}{% endfor %}",
        "{{ self._TemplateReference__context }}",
        "{{ lipsum }}{{ cycler }}{{ joiner }}{{ dict }}",
        "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
        "{% set ns = namespace(f='{0.__class__}'.format) %}{{ ns.f(1) }}",
    ],
)
def test_what_gives_nothing(source):
    with contextlib.suppress(jinja2.sandbox.SecurityError):
        assert render(source).strip() == ""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
        ("{{ (1).__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ chat.append(1) }}", "unsafe|not safely callable"),
        ("{{ chat[0].update(x=1) }}", "unsafe|not safely callable"),
        ("{{ chat[0]['pop']('role') }}", "unsafe|not safely callable"),
        ("{{ (chat[0]|attr('clear'))() }}", "unsafe|not safely callable"),
        ("{{ cycler('a').next.__globals__ }}{{ joiner() }}", "'cycler' is undefined"),
        ("{{ lipsum.__globals__.os.popen('id') }}", "'lipsum' is undefined"),
        ("{{ dict(a=1) }}", "'dict' is undefined"),
        ("{{ namespace(**{'__class__': 1}) }}", "is no name"),
        ("{{ namespace({'_x': 1}) }}", "is no name"),
        ("{% set ns = namespace() %}{% set ns.__dict__ = 1 %}", "is no name"),
        ("{{ chat[0].content.missing.more }}", "has no attribute 'missing'"),
        ("{{ chat[0].missing.more }}", "'dict object' has no attribute 'missing'"),
        ("{{ range(10 ** 9) }}", "too big"),
        ("{{ 'a' * 10 ** 9 }}", "too large"),
        ("{{ 10 ** 9 * 'a' }}", "too large"),
        ("{{ 9 ** 99999 }}", "too large"),
    ],
)
def test_what_is_refused(source, reason):
    with pytest.raises((jinja2.TemplateError, OverflowError), match=reason):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}",
        "{% for i in range(999)|select %}{% for j in range(999)|map('string') %}{% endfor %}{% endfor %}",
        "{% for i in text * 99 %}{% for j in text * 99 if i == j %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for x in 'ab' recursive %}{% if loop.depth < 40 %}{{ loop('ab') }}{{ loop('ab') }}{% endif %}{% endfor %}",
        "{% for x in [1] recursive %}{{ loop(range(9999)|map('string')) if loop.depth < 9 }}{% endfor %}",
        "{% set ns = namespace(d=0) %}{% block b %}{% set ns.d = ns.d + 1 %}{% if ns.d < 40 %}"
        "{{ self.b() }}{{ self.b() }}{% endif %}{% set ns.d = ns.d - 1 %}{% endblock %}",
        "{% for i in range(999) %}{% block b scoped %}{% for j in range(999) %}{% endfor %}{% endblock %}{% endfor %}",
        "{% macro g() %}{% for i in range(99) %}{{ caller() }}{% endfor %}{% endmacro %}"
        "{% call g() %}{% call g() %}{% call g() %}{% endcall %}{% endcall %}{% endcall %}",
    ],
)
def test_what_does_not_end(source, monkeypatch):
    monkeypatch.setattr(sandbox, "_MAX_STEPS", 10_000)
    with pytest.raises(InputError, match="takes more than 10000 steps"):
        render(source)


def test_loops_are_as_they_were():
    """What is counted has its length, its neighbours, its end, and its else."""
    source = (
        "{% for x in 'ab' %}{{ loop.length }}{{ loop.last }}{{ loop.nextitem }}{% endfor %}"
        "{% for x in ['a', '', 'b']|select %}{{ x }}{{ loop.revindex }}{% else %}none{% endfor %}"
        "{% for key, value in {'b': 1, 'a': 2}|dictsort %}{{ key }}{{ value }}{% endfor %}"
        "{% for x in nothing %}{% else %}none{% endfor %}"
        "{% for x in 'abc' if x != 'b' %}{{ x }}{{ loop.index }}{% endfor %}"
        "{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}"
    )
    expected = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(source).render(DATA)
    assert render(source) == expected


def test_what_templates_need():
    source = (
        "{{ chat[0].role.upper() }} {{ chat[0]['content'] }} {{ chat[0].absent }}{{ chat[0]['absent'] }} "
        "{{ chat[0].get('role') }} {{ chat[0]['items'] }} {{ chat[0].values()|list|length }} {{ chat[-1:]|length }} "
        "{{ 'a-{}-{x[y]}'.format(1, x={'y': 2}) }} {{ text.split()[1] }} {{ (text|attr('upper'))() }} "
        "{% set ns = namespace({'a': 1}, b=2) %}{% set ns.c = ns.a + ns.b %}{{ ns.c }} {{ ns }} {{ ns.d is defined }}"
    )
    assert render(source) == "USER Hi.  user 1 3 1 a-1-2 b A B 3 <Namespace {'a': 1, 'b': 2, 'c': 3}> False"
