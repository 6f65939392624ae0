"""Starting JAX: what is asked for and is not there is one sentence."""

import argparse

import jax
import pytest

from jaxmoe.cli import devices
from jaxmoe.errors import UserError


@pytest.mark.parametrize("count", [0, -1, 1025, 10**30])
def test_the_number_of_simulated_devices_is_bounded(count):
    """Catches a number with which starting takes minutes."""
    args = argparse.Namespace(cpu_devices=count, mesh=None)
    with pytest.raises(UserError, match=f"--cpu-devices {count} is not between 1 and 1024"):
        devices.start(args)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "there is none"),
        (RuntimeError("Unable to initialize backend 'cuda': no driver.\nmore"), "no driver"),
    ],
)
def test_a_platform_that_is_not_here(monkeypatch, error, reason):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match=f"JAX_PLATFORMS=cpu cannot be used .*{reason}") as found:
        devices.devices()
    assert "\n" not in str(found.value)


def test_help_names_any_folder(monkeypatch):
    """Catches a folder's name that argparse reads as a format."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/a%b")
    parser = argparse.ArgumentParser()
    devices.add_flags(parser)
    assert "/a%b/jaxmoe" in parser.format_help()


@pytest.mark.parametrize("dtypes", [("bfloat16",), ("bfloat16", "float32")])
def test_several_stored_dtypes_are_said(monkeypatch, capsys, dtypes):
    monkeypatch.setattr(devices.store, "main_dtypes", lambda checkpoint, text_only: dtypes)
    assert devices._one_dtype("checkpoint", text_only=True) == "bfloat16"
    said = capsys.readouterr().err
    assert said.count("\n") == len(dtypes) - 1
    assert ("loaded in bfloat16" in said) == (len(dtypes) > 1)
