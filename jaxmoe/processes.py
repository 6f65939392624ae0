"""What the processes of one run decide together, over `jax.distributed`.

All of them run the same program. The first one alone writes what is one file, while the others
wait, and an error that it meets is raised by all.
"""

import contextvars
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge  # nothing public says whether JAX has started its devices
from jax.experimental import multihost_utils

from jaxmoe.errors import UserError, sentence_of

_LEAST, _MOST = 1024, 1 << 30  # bytes that are sent at once
# Whether the first process runs an action of `on_first`, in which it is not to wait for the others.
_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


def several() -> bool:
    """Whether this process is one of several; starts no device.

    On the hosts of a TPU slice JAX knows the others without `jax.distributed`, once it has started.
    """
    started = jax.distributed.is_initialized() or xla_bridge.backends_are_initialized()
    return started and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return not several() or jax.process_index() == 0


def acts_alone() -> bool:
    """Whether this is an action of `on_first`, for which the other processes wait."""
    return _alone.get()


def on_first(action: Callable[[], Any]) -> Any:
    """What `action` returns on the first process, which alone calls it; all wait for it.

    Within an action it calls another one directly.

    Args:
        action: returns what JSON can hold.

    Raises:
        UserError: on every process, if `action` raises one, or an error of the file system.
    """
    if not several() or _alone.get():
        return action()
    outcome = json.loads(_from_first(_outcome(action) if is_first() else b""))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def _outcome(action: Callable[[], Any]) -> bytes:
    context = contextvars.copy_context()
    context.run(_alone.set, True)
    try:
        content = json.dumps({"value": context.run(action)}).encode()
        if len(content) > _MOST:
            raise UserError(
                f"The first process has {len(content) / 1e9:.1f} GB to tell the others at once, "
                f"more than {_MOST / 1e9:.1f} GB; let it read less, as by a smaller --block-rows."
            )
        return content
    except UserError as error:
        return json.dumps({"error": str(error)}).encode()
    except OSError as error:
        return json.dumps({"error": sentence_of(error)}).encode()


def _from_first(content: bytes) -> bytes:
    """The first process's content, on all."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    shared = np.zeros(max(_LEAST, 1 << (length - 1).bit_length()), np.uint8)  # few sizes to compile
    if is_first():
        shared[:length] = np.frombuffer(content, np.uint8)
    found = np.asarray(multihost_utils.broadcast_one_to_all(shared))
    return found.astype(np.uint8).tobytes()[:length]


def from_all(value: Any) -> list[Any]:
    """Each process's value, by the processes' numbers; all call it.

    Args:
        value: what JSON can hold.
    """
    if not several():
        return [value]
    content = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(content))).max())
    padded = np.frombuffer(content.ljust(longest), np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]
