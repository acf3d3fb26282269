"""Chat templates that try to get out, to run for ever, or to fill the memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import evermind_runtime.template_process as template_process
import pytest
from evermind_manifests.errors import InputError, MissingExtraError, TemplateError
from evermind_runtime.template_process import TemplateProcess

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess(seconds=1)
    yield made
    made.close()


VALUES = {"messages": [{"role": "user", "content": "hi"}], "bos_token": "<s>"}

#: What would give a template Python's internals: each is refused, or gives nothing.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ('' | attr('__class__')).__mro__ }}",
    "{{ [] | map(attribute='__class__') | list }}{{ [''] | map(attribute='__class__') | list }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['sys'].modules }}",
    "{{ strftime_now.__globals__ }}{{ strftime_now.__code__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__call__.__globals__ }}{{ dict.__class__.__base__ }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': ''}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__}'] | map('format', '') | list }}",
    "{{ '%s' | format(''.__class__) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__.__mro__ }}",
    "{{ namespace(__init__=1) }}",
    "{% for x in (joiner, cycler, range, lipsum) %}{{ x.__globals__ }}{{ x.mro }}{% endfor %}",
    "{{ messages.append({'role': 'x'}) }}",
    "{{ messages[0].update({'role': 'x'}) }}{{ messages[0].role }}",
    "{{ (1).__class__.__base__ }}{{ none.__class__ }}{{ true.real.__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__ }}{{ caller }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{% extends '/etc/hostname' %}",
    "{{ undefined.__class__ }}{{ undefined_one.__init__.__globals__ }}",
    "{{ (messages | groupby('role') | first).__class__ }}",
    "{{ ''.encode().__class__.fromhex('00').decode().__class__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_way_out(template: str, process: TemplateProcess) -> None:
    try:
        text = process.render(template, VALUES)
    except TemplateError as error:
        text = error.message.partition("failed: ")[2]
    for word in ("<class", "<module", "built-in function", "root:", "uid=", "site-packages"):
        assert word not in text
    assert len(text) < 300


#: What would take all memory, or all time, in one step that Python does not come back from.
BOMBS = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ [0] * 10 ** 10 }}",
    "{% set n = namespace(s='a' * 99) %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='a' * 99) %}{% for i in range(60) %}"
    "{% set n.s = [n.s, n.s] | join %}{% endfor %}",
    "{% set a = 'x' * 10 ** 6 %}{{ a.replace('x', a) }}",
    "{% set a = 'x' * 10 ** 6 %}{{ a | replace('x', a) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ 'x'.ljust(10 ** 10) }}{{ 'x'.zfill(10 ** 10) }}",
    "{{ '\\t'.expandtabs(10 ** 10) }}",
    "{{ 'a\\nb' | indent(10 ** 10) }}",
    "{{ [[1]] | tojson(indent=10 ** 10) }}",
    "{{ range(100001) | list }}",
    "{% for i in range(99999) %}{{ 'abcdefgh' * 99 }}{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "{{ lipsum(n=10 ** 7) }}",
]


@pytest.mark.parametrize("template", BOMBS, ids=range(len(BOMBS)))
def test_bombs_do_not_go_off(template: str, process: TemplateProcess) -> None:
    with pytest.raises(TemplateError, match="the chat template failed"):
        process.render(template, VALUES)
    assert process.render("{{ bos_token }}", VALUES) == "<s>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (7 ** 9) % 3 }}",
    ],
)
def test_endless_work_is_ended_by_the_processor_time_it_takes(
    template: str, process: TemplateProcess
) -> None:
    begin = time.process_time()
    with pytest.raises(TemplateError, match="more than 1 seconds of processor time"):
        process.render(template, VALUES)
    assert time.process_time() - begin < 1  # ours, not the worker's
    assert process.render("{{ bos_token }}", VALUES) == "<s>"


def test_the_worker_can_open_nothing() -> None:
    """What is left to one that got out of the sandbox: no file, no connection, no process."""
    worker = Path(template_process.__file__).with_name("template_worker.py")
    code = f"""
import importlib.util, os, socket, subprocess, sys
spec = importlib.util.spec_from_file_location("worker", {str(worker)!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
worker.confine()
for attempt in (lambda: open("/etc/hostname"), socket.socket, lambda: os.pipe(),
                lambda: subprocess.run(["true"], stdout=subprocess.PIPE)):
    try:
        attempt()
    except OSError:
        print("refused")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["refused"] * 4


def test_a_conversation_that_is_no_json_or_too_long_is_refused(process: TemplateProcess) -> None:
    with pytest.raises(InputError, match="JSON"):
        process.render("", {"messages": [{"content": b"bytes"}]})
    with pytest.raises(InputError, match="at most"):
        process.render("", {"messages": ["x" * (65 * 1024 * 1024)]})


def test_without_jinja_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"evermind-pack\[text\]"):
        TemplateProcess().render("x", {})


def test_a_jinja_that_is_not_safe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.1.5")
    with pytest.raises(TemplateError, match=r"3\.1\.6 or later, found 3\.1\.5"):
        TemplateProcess().render("x", {})
