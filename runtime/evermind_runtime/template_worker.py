"""The process that renders chat templates: run as a script, alone, with nothing to lose.

A chat template is a program of whoever made the checkpoint. Jinja's sandbox keeps it from Python's
internals, but not from endless loops and strings of any size; so it runs here, where the system
bounds processor time and memory and no file can be opened. What it can do is what transformers
lets it do: the same filters, functions, tags and blocks of white space.

Requests come on stdin, answers go to stdout: each a length (u32, little endian) and that many bytes
of JSON. A request is `{template, values}`, an answer one of `{text}`, `{refused}` (the template
itself raised an exception), `{failed}` and `{exhausted}` (and is better not asked again). It ends
with its stdin.
"""

from __future__ import annotations

import json
import pprint  # noqa: F401  # Jinja imports it when a template asks, which is too late here.
import resource
import struct
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.debug  # Imported when a template fails, which is too late here.
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Address space of the process, and the longest text in characters.
MEMORY_BYTES = 512 * 1024 * 1024
MAX_TEXT = 4 * 1024 * 1024
_SHOWN = 500


class RefusalError(TemplateError):
    """What `raise_exception` raises: the template does not take these messages."""


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model says: here it is only written."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """The block, a scope of its own as a called macro is."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Macro) -> str:
        return caller()


class PlainNamespace(Namespace):
    """`namespace(…)` without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        merged = dict(*rest, **values)
        for name in merged:
            _check_name(name)
        Namespace.__init__(self, merged)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class PlainDict:
    """`dict(…)` without the type's own attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        """A dictionary, as `dict` makes it."""
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`: JSON as it is, where Jinja's own escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: Any) -> None:
    """The function by which templates refuse messages."""
    raise RefusalError(str(message))


def strftime_now(form: str) -> str:
    """The function by which templates write today's date."""
    return datetime.now().strftime(form)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace: names may not begin with an underscore: {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    """What templates see."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        dict=PlainDict(),
        namespace=PlainNamespace,
    )
    return made


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """One request's answer; never raises."""
    try:
        parts: list[str] = []
        length = 0
        for part in _compiled(request["template"]).generate(request["values"]):
            length += len(part)
            if length > MAX_TEXT:
                return {"failed": f"it writes more than {MAX_TEXT:,} characters"}
            parts.append(part)
        return {"text": "".join(parts)}
    except RefusalError as error:
        return {"refused": str(error)[:_SHOWN]}
    except MemoryError:
        return {"exhausted": f"it needs more than {MEMORY_BYTES:,} bytes of memory"}
    except RecursionError:
        return {"exhausted": "it is nested too deeply"}
    except TemplateSyntaxError as error:
        return {"failed": f"line {error.lineno}: {str(error.message)[:_SHOWN]}"}
    except Exception as error:  # a template can raise anything that Python can
        return {"failed": f"{type(error).__name__}: {str(error)[:_SHOWN]}"}


def confine() -> None:
    """Give up what rendering does not need, for good."""
    _compiled("{{ strftime_now('%c %Z') }}").render()  # reads the time zone while files can be
    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def allow(seconds: int) -> None:
    """So much processor time from now on; then the system ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def serve(requests: BinaryIO, answers: BinaryIO, seconds: int) -> None:
    """Answer until there are no more requests, each in so much processor time."""
    while head := requests.read(4):
        (length,) = struct.unpack("<I", head)
        request = json.loads(requests.read(length))
        allow(seconds)
        data = json.dumps(answer(request)).encode()
        answers.write(struct.pack("<I", len(data)) + data)
        answers.flush()


if __name__ == "__main__":
    confine()
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))
