"""What the processes of one run decide together, over `jax.distributed`.

All of them run the same program. The first one alone writes what is one file, while the others
wait, and an error that it meets is raised by all.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.errors import UserError

_BYTES = 8192  # of a result as JSON; a UserError's message is shorter


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def on_first(action: Callable[[], Any]) -> Any:
    """What `action` returns on the first process, which alone calls it; all wait for it.

    Args:
        action: returns what JSON can hold.

    Raises:
        UserError: on every process, if `action` raises one.
    """
    if jax.process_count() == 1:
        return action()
    found = _outcome(action) if is_first() else b""
    shared = np.zeros(_BYTES, np.uint8)
    shared[: len(found)] = np.frombuffer(found, np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(shared)).astype(np.uint8).tobytes()
    outcome = json.loads(text.rstrip(b"\0"))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def _outcome(action: Callable[[], Any]) -> bytes:
    try:
        return json.dumps({"value": action()}).encode()
    except UserError as error:
        return json.dumps({"error": str(error)}).encode()


def flags(mesh: jax.sharding.Mesh, flag: bool) -> jax.Array | None:
    """Each process's own flag, for a compiled function to combine; None for a single process.

    Returns:
        bool [devices], divided over all devices.
    """
    if jax.process_count() == 1:
        return None
    layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), layout, lambda index: np.full((1,), flag))
