"""Short texts that the processes of a program write for each other without waiting.

They are in the key-value store of JAX's coordination service, which is reached from any thread
while others wait in a collective.
"""

import contextlib
from typing import Any

import jax
from jax._src import distributed  # nothing public gives the key-value store

_PREFIX = "jaxmoe/"
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # where JAX writes that a process was sent SIGTERM


class Board:
    """The texts of all processes; of one process alone, nothing but its own."""

    def __init__(self):
        """Finds the store, if JAX has one."""
        self._client: Any = getattr(distributed.global_state, "client", None)
        self._own: dict[str, str] = {}

    def put(self, folder: str, name: str, text: str) -> None:
        """Writes a text, in place of one that is there."""
        if self._client is None:
            self._own[f"{folder}/{name}"] = text
        else:
            key = f"{_PREFIX}{folder}/{name}"
            self._client.key_value_set(key, text, allow_overwrite=True)

    def texts(self, folder: str) -> dict[str, str]:
        """The texts of a folder by their names."""
        if self._client is None:
            pairs = list(self._own.items())
        else:
            pairs = self._client.key_value_dir_get(f"{_PREFIX}{folder}/")
        return {key.rpartition("/")[2]: text for key, text in pairs if f"{folder}/" in key}

    def has_notice(self) -> bool:
        """Whether a process was sent SIGTERM."""
        if self._client is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is not there
                return bool(self._client.key_value_try_get(_NOTICE))
        return False
