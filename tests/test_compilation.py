"""Compiled programs are kept where users expect, and long compilations are announced."""

import pwd

import jax
import jax.numpy as jnp
import pytest

from jaxmoe import compilation
from jaxmoe.compilation import default_folder, keep_compiled, on_long_compilation
from jaxmoe.errors import UserError

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_compilation_cache_max_size",
)


@pytest.fixture(autouse=True)
def no_cache():
    """Unsets the cache's folder at the start of a test, and restores all settings at its end."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_the_place_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "jaxmoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "jaxmoe"


def test_a_user_without_a_home(monkeypatch):
    """Catches a traceback in a container whose user has no home."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert str(default_folder()) == "~/.cache/jaxmoe"
    assert keep_compiled() is None


def test_a_program_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "_MIN_SECONDS", 0)
    assert keep_compiled(tmp_path / "kept") == str(tmp_path / "kept")
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

    def run():
        jax.clear_caches()
        jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 4))).block_until_ready()

    run()
    assert "/jax/compilation_cache/cache_hits" not in events
    run()
    assert "/jax/compilation_cache/cache_hits" in events


def test_what_jax_was_told_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert keep_compiled() == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/kept cannot be used: Not a directory; choose"):
        keep_compiled(tmp_path / "file" / "kept")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(("patience", "expected"), [(0.0, 1), (60.0, 0)])
def test_a_word_is_said_once_and_only_of_what_takes_long(monkeypatch, patience, expected):
    monkeypatch.setattr(compilation, "_PATIENCE", patience)
    said: list[int] = []
    on_long_compilation(lambda: said.append(1))
    for n in range(2, 5):
        size = n

        @jax.jit
        def slow(x, size=size):
            for _ in range(30):
                x = jnp.sin(x @ x) + size
            return x

        slow(jnp.ones((size, size))).block_until_ready()
    assert len(said) == expected
