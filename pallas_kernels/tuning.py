"""Looks up kernel configs in the files of `tuned/`, one for each kind of device.

Those of GPUs are written by `jaxmoe tune`. Those of TPUs have the sizes that do better than the
rules of the kernels by the compiler's schedule, with the bundles of both.
"""

import functools
import json
import re
from pathlib import Path

from pallas_kernels.platform import target

FOLDER = Path(__file__).parent / "tuned"


def file_of(device_kind: str) -> Path:
    """The path of a device kind's configs, such as `tuned/nvidia-h200.json`; it may not exist."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', device_kind.lower()).strip('-')}.json"


def lookup(op: str, **key) -> dict | None:
    """The fields of the config tuned for the current device; None if there is no such entry.

    Args:
        op: a kernel's name, such as "decode".
        **key: everything that the entry's config depends on, such as head_dim=128.
    """
    return _configs(target().device_kind).get((op, frozenset(key.items())))


@functools.cache
def _configs(device_kind: str) -> dict[tuple, dict]:
    """A device kind's configs, by (op, frozenset of the key's items)."""
    path = file_of(device_kind)
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    return {(entry["op"], frozenset(entry["key"].items())): entry["config"] for entry in entries}
