"""Renders chat templates in a process of its own, with limited time and memory.

A template is a program by a stranger. Jinja's sandbox keeps it from files and from Python, but not
from running forever or filling the memory; the limits of a process do.

Run as a script, it answers each line of its input, a JSON object with `template`, `variables` and
`seconds`, by one line: `{"text": ...}`, or `{"error": ..., "line": ...}` with the line of the
template or null. It imports only Jinja and the standard library, so it starts quickly.
"""

import contextlib
import datetime
import encodings.unicode_escape
import functools
import html.entities
import json
import resource
import sys
import time
import traceback
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Modules that would be imported during a rendering, when no file can be opened any more.
LATE = (encodings.unicode_escape, html.entities, jinja2.constants, jinja2.debug)

MEMORY = 2**30  # bytes of address space, plus 64 for each byte of the request
TEXT = 2**20  # characters of a rendering, plus four for each byte of the request


class _Generation(Extension):
    """Ignores the tag `{% generation %}`, which marks what a model is trained to write."""

    tags = {"generation"}  # noqa: RUF012  # the type that `Extension` declares

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The compiled template, with the filters and functions that transformers gives to it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source, globals=functions)


def answer(request: dict[str, Any], longest: int) -> dict[str, Any]:
    """The reply to a request: the rendered text, or why there is none.

    Args:
        request: with `template` and `variables`.
        longest: the most characters that the text may have.
    """
    parts, length = [], 0
    try:
        for part in compiled(request["template"]).generate(**request["variables"]):
            parts.append(part)
            length += len(part)
            if length > longest:
                return {"error": f"it writes more than {longest} characters", "line": None}
        return {"text": "".join(parts)}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB of memory", "line": None}
    except RecursionError:
        return {"error": "it is nested too deeply", "line": None}
    except Exception as error:  # an expression of the template may raise anything
        return {"error": str(error) or type(error).__name__, "line": _line(error)}


def main() -> None:
    """Answers requests until the input ends."""
    time.localtime()  # reads the file of the time zone while files can still be opened
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit(request["seconds"], len(line))
        reply = answer(request, TEXT + 4 * len(line))
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit(seconds: int, size: int) -> None:
    """Limits the processor time and memory of the next rendering.

    The system ends the process when it needs more.

    Args:
        seconds: of processor time.
        size: bytes of the request.
    """
    _lower(resource.RLIMIT_CPU, int(time.process_time()) + 1 + seconds)
    with contextlib.suppress(*((ValueError,) if sys.platform == "darwin" else ())):
        _lower(resource.RLIMIT_AS, MEMORY + 64 * size)  # which macOS refuses


def _lower(kind: int, limit: int) -> None:
    """Sets a limit of this process, at most to the hard limit that it was given."""
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _line(error: Exception) -> int | None:
    """The line of the template that an error comes from; None if it is unknown."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    steps = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in steps if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """A value as JSON text; unlike Jinja's own filter, it escapes no HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


if __name__ == "__main__":
    main()
