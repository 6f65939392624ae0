"""Compiler options, compiled programs kept for later processes, and a word when one compiles."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from jaxmoe.errors import UserError

# XLA may leave out roundings to bfloat16 between operations, and on CPUs it does or does not by the
# shapes of the operands. With every rounding in its place, a token's values hardly depend on the
# tokens beside it, and agree with implementations that round likewise.
KEEP_ROUNDINGS = {"xla_allow_excess_precision": False}

_MAX_BYTES = 10 * 2**30
_MIN_SECONDS = 0.5  # programs that take less to compile are not kept
_PATIENCE = 2.0  # seconds of compiling before the user is told
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def default_folder() -> Path:
    """The folder where users expect caches: `$XDG_CACHE_HOME/jaxmoe` or `~/.cache/jaxmoe`.

    For a user without a home, as in some containers, the path is relative and begins with `~`.
    """
    home = os.path.expanduser("~")
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")) / "jaxmoe"


def keep_compiled(folder: str | Path | None = None) -> str | None:
    """Makes JAX keep compiled programs in a folder and reuse those of earlier processes.

    If the programs exceed 10 GiB, the least recently used ones are removed.

    Args:
        folder: default: the one that `JAX_COMPILATION_CACHE_DIR` or `jax.config` gives, else
            `default_folder()` if that can be written.

    Returns:
        The folder in use, or None.

    Raises:
        UserError: if `folder` is given and cannot be written.
    """
    if folder is None and jax.config.jax_compilation_cache_dir:
        return jax.config.jax_compilation_cache_dir
    place = Path(folder or default_folder())
    if folder is None and not place.is_absolute():
        return None
    place = place.absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
        refused = None if os.access(place, os.W_OK | os.X_OK) else "it may not be written to"
    except OSError as error:
        refused = error.strerror
    if refused:
        if folder is None:  # without a cache everything works, only slower
            return None
        raise UserError(f"compilation cache {place} cannot be used: {refused}; choose another.")
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    return str(place)


def watch_compilations() -> Callable[[], bool]:
    """Returns a function that says whether a program is being compiled now."""
    running = 0

    def listen(event: str, duration_secs: float, **metadata) -> None:
        nonlocal running
        if event in (_LOWERED, _COMPILED):
            running = max(0, running + (1 if event == _LOWERED else -1))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: running > 0


def on_long_compilation(say: Callable[[], None]) -> None:
    """Calls `say` once, from another thread, when a compilation takes more than 2 seconds."""
    timers: list[threading.Timer] = []
    said = threading.Event()

    def say_once() -> None:
        if not said.is_set():
            said.set()
            say()

    def listen(event: str, duration_secs: float, **metadata) -> None:
        if event in (_LOWERED, _COMPILED):
            while timers:
                timers.pop().cancel()
        if event == _LOWERED and not said.is_set():
            timers.append(threading.Timer(_PATIENCE, say_once))
            timers[-1].daemon = True
            timers[-1].start()

    jax.monitoring.register_event_duration_secs_listener(listen)
