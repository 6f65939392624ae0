"""Finds and renders the chat templates of a checkpoint."""

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.parsing import read_json, read_text
from jaxmoe.text import jinja_worker

SECONDS = 10  # of processor time for one rendering

_JINJA_FILE = "chat_template.jinja"
_JSON_FILE = "chat_template.json"
_CONFIG_FILE = "tokenizer_config.json"
_NAMES_FILE = "special_tokens_map.json"
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TooMuch(UserError):
    """The error of a template that needs more time or memory, or writes more, than it may."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja program that writes a conversation as text.

    Attributes:
        source: the program.
        where: its file, for error messages.
    """

    source: str
    where: str

    def render(self, **variables: Any) -> str:
        """The text that the template writes, in a sandbox with limited time and memory.

        Raises:
            UserError: if the template is broken or refuses the variables.
            TooMuch: if it needs more than the limits.
        """
        request = {"template": self.source, "variables": variables, "seconds": SECONDS}
        answer = _WORKER.ask(request)
        if "text" in answer:
            return answer["text"]
        place = f" line {answer['line']}" if answer["line"] else ""
        raise (TooMuch if answer["line"] is None else UserError)(
            f"{self.where}{place} cannot render these messages ({_short(answer['error'])}); "
            'correct them, or write them as a "prompt" with --parse-special'
        )


def read_templates(folder: Path) -> dict[str, ChatTemplate]:
    """The chat templates of a checkpoint folder by name; most have one, `default`, or none.

    They are in chat_template.jinja, else in chat_template.json, else in tokenizer_config.json.

    Raises:
        UserError: if one of these files is broken.
    """
    path = folder / _JINJA_FILE
    if path.exists():
        return {"default": ChatTemplate(read_text(path), str(path))}
    for path in (folder / _JSON_FILE, folder / _CONFIG_FILE):
        found = _object(path).get("chat_template")
        if found is not None:
            return _templates(found, f"{path}, chat_template")
    return {}


def _templates(found: Any, where: str) -> dict[str, ChatTemplate]:
    """The templates in the value of a `chat_template`, by name.

    Args:
        found: one text, or a list of `{"name": ..., "template": ...}`.
        where: the file and key, for error messages.
    """
    named = {"default": found} if isinstance(found, str) else {}
    for entry in found if isinstance(found, list) else ():
        match entry:
            case {"name": str(name), "template": str(source)}:
                named[name] = source
            case _:
                named = {}
                break
    if not named:
        raise UserError(
            f'{where} is neither a text nor a list of {{"name": ..., "template": ...}}; '
            "correct or remove it"
        )
    return {name: ChatTemplate(source, where) for name, source in named.items()}


def read_special_names(folder: Path) -> dict[str, str]:
    """The special tokens of a checkpoint by their roles: `bos_token`, `eos_token` and so on.

    They are in tokenizer_config.json, else in special_tokens_map.json.

    Raises:
        UserError: if one of these files is broken.
    """
    names: dict[str, str] = {}
    for path in (folder / _NAMES_FILE, folder / _CONFIG_FILE):
        content = _object(path)
        for key in (f"{name}_token" for name in _NAMES):
            match content.get(key):
                case None:
                    pass
                case str(token) | {"content": str(token)}:
                    names[key] = token
                case _:
                    raise UserError(f"{path} has a {key} that is no text; correct or remove it")
    return names


def _object(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; an empty one if there is no such file."""
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; correct or remove it")
    return content


def _short(reason: str) -> str:
    return f"{' '.join(reason.split()):.200}"


class _Worker:
    """The process that renders templates; it is started when needed, and again if it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's reply to a request; see `jinja_worker`."""
        with self._lock:
            try:
                return self._exchange(json.dumps(request).encode() + b"\n")
            except BaseException:  # also Ctrl-C: the next request would get this reply
                self.stop()
                raise

    def _exchange(self, line: bytes) -> dict[str, Any]:
        if self._process is None:
            self._process = _start()
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(line)
            stdin.flush()
            reply = stdout.readline()
        except BrokenPipeError:
            reply = b""
        if reply.endswith(b"\n"):
            return json.loads(reply)
        self.stop()
        limits = f"{SECONDS} seconds or {jinja_worker.MEMORY >> 20} MiB of memory"
        return {"error": f"it takes more than {limits}", "line": None}

    def stop(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", jinja_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C then reaches only the parent process
    )


_WORKER = _Worker()
atexit.register(_WORKER.stop)
