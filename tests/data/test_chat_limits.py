"""Chat templates that fail, loop or grow end in one message; the others stay as fast."""

import contextlib
import datetime
import os
import resource
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt_jax.data import chat_limits
from rlt_jax.data.chat import ChatTemplate
from rlt_jax.errors import UserError
from tests.data.mutations import COUNTS, check_settings, message_of

NOW = datetime.datetime(2024, 2, 29, 12)
USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "It is 7."}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(source: str, **variables: Any) -> str:
    return ChatTemplate("tokenizer X", source, variables, NOW).render([USER])


@contextlib.contextmanager
def limit_of(seconds: float) -> Iterator[None]:
    """In it a new process renders, with another limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_limits, "SECONDS", seconds)
        chat_limits._start.cache_clear()
        yield
    chat_limits._start.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def short_limit() -> Iterator[None]:
    with limit_of(0.3):
        yield


GROW = "{% set ns = namespace(x='aa', y=[1], z=[1]) %}{% for i in range(99) %}"
# In each the work is done by another construct. Those of the first kind make too much, in
# less than the limit of time; the others are ended by it.
LARGE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "times of a list": "{{ ([1] * 10**9) | length }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "format with a width": "{{ '%*d' % (10**10, 1) }}",
    "method": "{{ 'a'.center(10**10) }}",
    "format method": "{{ '{:>{w}}'.format(1, w=10**10) }}",
    "filter": "{{ 'a' | center(10**10) }}",
    "indent": "{{ ('a\n' * 9999) | indent(10**6) }}",
    "indent of JSON": "{{ ([[1]] * 9999) | tojson(indent=10**6) }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'a' * 10**6) }}",
    "join": "{{ (['a' * 10**6] * 10**5) | join }}",
    "map": "{{ range(99999) | map('center', 10**6) | join }}",
    "batch": "{{ [1] | batch(10**10, 1) | list }}",
    "bytes": "{{ 5.to_bytes(10**10) }}",
    "sum": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "concatenation": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "block": GROW + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "lists": GROW + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y }}",
    "output": "{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}",
    "plain text": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a block without end": "{% block a %}{{ self.a() }}{% endblock %}",
    "a loop without end": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}",
    "blocks": "{% for x in [1] %}" * 999 + "{% endfor %}" * 999,
    "operators": "{{ " + "1+" * 10**5 + "1 }}",
}
SLOW = {
    "loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "the test of a loop": (
        "{% for i in range(99999) if range(99999) | list | sum < 0 %}{% endfor %}"
    ),
    "macros": (
        "{% macro f(n) %}{% if n %}{% set a, b = f(n - 1), f(n - 1) %}{% endif %}"
        "{% endmacro %}{{ f(99) }}"
    ),
    "comparison": (
        GROW + "{% set ns.y = [ns.y, ns.y] %}{% set ns.z = [ns.z, ns.z] %}{% endfor %}"
        "{{ ns.y == ns.z }}"
    ),
    "power": "{{ (10**9 ** 9) % 7 }}{{ 7 ** (7 ** 12) }}",
    "search": "{{ ('a' * 10**7).rfind('ab' + 'a' * 10**6) }}",
    "strip": "{{ ('a' * 10**7).strip('b' * 10**7 + 'a') }}",
    "select": "{{ range(99999) | map('string') | select('in', 'a' * 10**7) | list }}",
    "lorem ipsum": "{{ lipsum(n=10**6) }}",
    "sum of lists": "{{ ([[1] * 9] * 99999) | sum(start=[]) | length }}",
    "round": "{{ 1 | round(10**9, 'floor') }}",
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_template_that_makes_too_much_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"^tokenizer X: the chat template fails: ."):
        render(LARGE[kind])


@pytest.mark.parametrize("kind", SLOW)
def test_a_template_that_takes_too_long_is_refused(kind: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    limit = "fails: (it takes more than 0.3 seconds, or too much memory|MemoryError)"
    with pytest.raises(UserError, match=f"^tokenizer X: the chat template {limit}"):
        render(SLOW[kind])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the process that has ended, or of none; imports take a part of it.
    assert after.ru_utime + after.ru_stime < before.ru_utime + before.ru_stime + 3
    assert after.ru_maxrss <= max(before.ru_maxrss, 1.1 * 2**20)  # KiB


def test_only_messages_may_show_that_a_template_has_no_end() -> None:
    loop = LARGE["range"].replace("10**9", "99999") + SLOW["loops"]
    for test in ("messages | length == 3", "messages[0].role == 'system'"):
        source = f"{{% if {test} %}}{loop}{{% endif %}}{CHATML}"
        template = ChatTemplate("tokenizer X", source, {}, NOW)
        with pytest.raises(UserError, match="more than 0.3 seconds"):
            template.render([{"role": "system", "content": ""}, USER, ANSWER])
        # What a tokenizer asks for when it is loaded is not asked for again and again.
        if "role" in test:
            with pytest.raises(UserError, match="more than 0.3 seconds"):
                template.takes_system()
        assert template.ending() == "<|im_end|>\n"


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ['', ''] | map(attribute='__class__') | list }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{x.__class__.__base__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{{ {}.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ strftime_now.__self__ }}",
    "{{ namespace.__init__.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__.os }}",
    "{{ joiner.__init__ }}",
    "{{ range.__class__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__ }}",
    "{% for x in [1] %}{{ loop._iterable }}{% endfor %}",
    "{% macro f() %}{% endmacro %}{{ f._func }}",
    "{% macro f() %}{{ caller.__call__ }}{% endmacro %}{% call f() %}{% endcall %}",
    "{{ ([1] | map('string')).gi_frame }}",
    "{{ ([1] | map('string')).gi_code }}",
    "{{ dict.mro() }}",
    "{% set _ = messages.append(1) %}",
    "{% set _ = messages[0].update(content='x') %}",
    "{% set _ = messages.clear() %}",
    "{{ messages.__class__ }}",
    "{{ config.__class__ }}",
    "{% import 'os' as os %}{{ os }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ open('/etc/passwd') }}",
    "{{ __import__('os') }}",
    "{{ ().__class__.__bases__ }}",
    "{{ messages[0].content.__add__('x') }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_python_itself_is_out_of_reach(source: str) -> None:
    with pytest.raises(UserError, match="^tokenizer X: the chat template fails: "):
        render(source)


def test_the_message_says_which_attribute_is_refused() -> None:
    with pytest.raises(UserError, match="cannot use the attribute '__globals__'. Set"):
        render("{{ raise_exception.__globals__ }}")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (CHATML, "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"),
        ("{{ 'a' * 100 }}", "a" * 100),
        ("{{ 'ab' | center(10) }}{{ '%5d' % 7 }}", "    ab        7"),
        ("{{ '{:>4}|{}'.format(7, 1718000000) }}", "   7|1718000000"),
        ("{{ range(99999) | list | length }}", "99999"),
        ("{{ lipsum(n=1, html=false) | length > 9 }}", "True"),
        ("{{ [1, 2] | sum(start=3) }}{{ 2 ** 70 }}", "6" + str(2**70)),
        ("{{ strftime_now('%d %b %Y') }}", "29 Feb 2024"),
        ("{{ x | tojson }}{{ y }}", '{"a": [1.5, null, true, "é"]}</s>'),
        ("{{ x.a[0] + 1 }}{{ x.b is defined }}", "2.5False"),
        ("{{ (messages | selectattr('role', 'equalto', 'x')) | list }}", "[]"),
    ],
)
def test_plain_uses_of_the_same_are_fine(source: str, text: str) -> None:
    assert render(source, x={"a": [1.5, None, True, "é"]}, y="</s>") == text


def test_long_chats_are_fine() -> None:
    with limit_of(5):
        check_long_chats()


def check_long_chats() -> None:
    template = ChatTemplate("tokenizer X", CHATML, {}, NOW)
    long = {"role": "user", "content": "A word in 2024, " * 100_000 + "🦉"}
    text = template.render([long, ANSWER] * 4)
    assert text.count("🦉") == 4 and len(text) > 6_000_000
    repeated = ChatTemplate("tokenizer X", CHATML * 5, {}, NOW)
    assert repeated.render([long]).count("🦉") == 5


def test_a_chat_takes_little_time() -> None:
    template = ChatTemplate("tokenizer X", CHATML, {}, NOW)
    begin = os.times()
    for _ in range(500):
        template.render([USER, ANSWER] * 10)
    end = os.times()
    # About 0.1 ms each, most of it in the other process, which the sum leaves out.
    assert end.user + end.system - begin.user - begin.system < 2


def test_threads_share_the_process() -> None:
    template, wrong = ChatTemplate("tokenizer X", CHATML, {}, NOW), []

    def work(name: str) -> None:
        for n in range(30):
            content = f"{name} {n}"
            if f"\n{content}<" not in template.render([USER | {"content": content}]):
                wrong.append(content)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Interrupted:
    """Ctrl-C arrives while a file waits."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readline(self) -> bytes:
        raise KeyboardInterrupt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_an_interrupted_rendering_leaves_no_reply_for_the_next() -> None:
    template = ChatTemplate("tokenizer X", CHATML, {}, NOW)
    process = chat_limits._start(os.getpid())
    process.stdout = Interrupted(process.stdout)
    with pytest.raises(KeyboardInterrupt):
        template.render([USER | {"content": "First?"}])
    assert process.returncode is not None
    assert "Hello?" in template.render([USER])


def test_a_process_that_has_died_is_replaced() -> None:
    template = ChatTemplate("tokenizer X", CHATML, {}, NOW)
    process = chat_limits._start(os.getpid())
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="the chat template fails"):
        template.render([USER])
    assert "Hello?" in template.render([USER])
    assert chat_limits._start(os.getpid()) is not process


def test_a_fork_has_a_process_of_its_own() -> None:
    own, other = chat_limits._start(os.getpid()), chat_limits._start(-1)
    assert own.pid != other.pid
    assert chat_limits._start(os.getpid()) is own


def test_variables_that_are_not_json_are_refused() -> None:
    with pytest.raises(UserError, match="fails: Object of type object is not JSON"):
        render("{{ x }}", x=object())


EXPRESSIONS = st.recursive(
    st.sampled_from(
        [
            *["messages", "messages[0].content", "'a'", "''", "1", "0", "-1", "99999"],
            *["ns.x", "ns", "x", "none", "true", "[]", "{}", "range(9999)", "loop"],
            *["messages[1:]", "tools", "undefined.x", "1.5", "'%9999d{:>9999}'"],
        ]
    ),
    lambda inner: st.one_of(
        st.builds(
            "({} {} {})".format,
            inner,
            st.sampled_from([*"+-*/%~<", "**", "//", "==", "in", "and", "or", "is"]),
            inner,
        ),
        st.builds(
            "({} | {})".format,
            inner,
            st.sampled_from(
                [
                    *["list", "length", "join", "tojson", "upper", "sort", "string"],
                    *["center(9999)", "indent(99)", "replace('', 'aaa')", "batch(99)"],
                    *["map('string')", "sum", "first", "trim", "format(1)", "unique"],
                ]
            ),
        ),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{{'a': {}, 'b': {}}}".format, inner, inner),
        st.builds("f({})".format, inner),
        st.builds("({}).format({})".format, inner, inner),
        st.builds("({}).split({})".format, inner, inner),
    ),
    max_leaves=8,
)
STATEMENTS = st.recursive(
    st.one_of(
        EXPRESSIONS.map("{{{{ {} }}}}".format),
        EXPRESSIONS.map("{{% set x = {} %}}".format),
        EXPRESSIONS.map("{{% set ns.x = {} %}}".format),
    ),
    lambda inner: st.one_of(
        st.builds("{{% for x in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% if {} %}}{}{{% endif %}}".format, EXPRESSIONS, inner),
        st.builds("{{% set x %}}{}{}{{% endset %}}".format, inner, inner),
        st.builds("{}{}".format, inner, inner),
        inner.map("{{% macro f(x) %}}{}{{% endmacro %}}".format),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(
    "examples", [COUNTS[0], pytest.param(COUNTS[1], marks=pytest.mark.slow)]
)
def test_any_template_ends(examples: int) -> None:
    outcomes = []

    @check_settings(examples)
    @given(STATEMENTS)
    def check(source: str) -> None:
        source = f"{{% set ns = namespace(x='a') %}}{source}"
        message = message_of(lambda: render(source), "the chat template fails: ")
        outcomes.append(message)

    check()
    assert 0 < sum(map(bool, outcomes)) < len(outcomes)
