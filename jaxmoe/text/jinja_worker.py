"""Renders chat templates in a process of its own.

A template is a stranger's program. Jinja's sandbox keeps it from files and from Python, but not
from running for ever or from filling the memory; the limits of a process do.

Run as a script it answers each line of its input, a JSON object of `template`, `variables` and
`seconds`, by a line: `{"text": ...}`, or `{"error": ..., "line": of the template or null}`. It
imports Jinja and the standard library only, so it starts at once.
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

# What Jinja and Python would import while they render, when no file can be opened any more.
LATE = (encodings.unicode_escape, html.entities, jinja2.constants, jinja2.debug)

MEMORY = 2**30  # bytes of address space, beside 64 for each byte of the request
TEXT = 2**20  # characters that a rendering may have, beside four for each byte of the request


class _Generation(Extension):
    """Reads `{% generation %}`, which marks what a model is trained to write, as nothing."""

    tags = {"generation"}  # noqa: RUF012  # as the class above has it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The template in the environment that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source, globals=functions)


def answer(request: dict[str, Any], longest: int) -> dict[str, Any]:
    """What the template of a request makes of its variables, at most `longest` characters."""
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
    except Exception as error:  # whatever an expression of the template may raise
        return {"error": str(error) or type(error).__name__, "line": _line(error)}


def main() -> None:
    """Answers until the input ends."""
    time.localtime()  # reads the time zone's file, while files can be opened
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit(request["seconds"], len(line))
        reply = answer(request, TEXT + 4 * len(line))
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit(seconds: int, size: int) -> None:
    """Limits what the next rendering may take; the system ends a process that takes more."""
    _lower(resource.RLIMIT_CPU, int(time.process_time()) + 1 + seconds)
    with contextlib.suppress(*((ValueError,) if sys.platform == "darwin" else ())):
        _lower(resource.RLIMIT_AS, MEMORY + 64 * size)  # macOS has processes of any size


def _lower(kind: int, limit: int) -> None:
    """Limits something, to less if this process was given less."""
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _line(error: Exception) -> int | None:
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
    """JSON as it is, where Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


if __name__ == "__main__":
    main()
