"""Configs that jaxmoe tune found, a file for each kind of device; nothing is tuned here."""

import functools
import json
import re
from pathlib import Path

from pallas_kernels.platform import target

FOLDER = Path(__file__).parent / "tuned"


def file_of(device_kind: str) -> Path:
    """Where the configs of such devices are, if there are any."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', device_kind.lower()).strip('-')}.json"


def lookup(op: str, **key) -> dict | None:
    """The fields of the config for the current device; None if there is no entry with this key.

    Args:
        op: a kernel's name, such as "decode".
        key: what its config depends on, such as head_dim=128.
    """
    return _configs(target().device_kind).get((op, frozenset(key.items())))


@functools.cache
def _configs(device_kind: str) -> dict[tuple, dict]:
    """By op and key."""
    path = file_of(device_kind)
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    return {(entry["op"], frozenset(entry["key"].items())): entry["config"] for entry in entries}
