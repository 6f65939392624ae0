"""A machine without accelerators, whose compilers are installed: JAX is not to look for them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels import hardware

ROOT = Path(__file__).parents[2]
CHOICES = ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")


@pytest.mark.skipif(
    hardware.has_cuda_driver() or hardware.has_tpu(), reason="an accelerator is there"
)
def test_a_plain_shell_sees_no_complaint():
    """Catches what JAX prints of CUDA and TPU compilers that find no hardware."""
    plain = {name: value for name, value in os.environ.items() if name not in CHOICES}
    code = "import jax, jaxmoe; print(jax.devices()[0].platform)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=plain, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.parametrize(
    ("driver", "tpu", "plugins", "chosen", "expected"),
    [
        (False, False, {"xla_cuda13"}, None, "cpu"),
        (False, False, set(), None, "cpu"),
        (True, False, {"xla_cuda13"}, None, None),
        (False, True, {"xla_cuda13"}, None, None),
        (False, False, {"xla_cuda13", "metal"}, None, None),
        (False, False, {"xla_cuda13"}, "cuda", "cuda"),
    ],
)
def test_only_what_is_absent_is_left_out(monkeypatch, driver, tpu, plugins, chosen, expected):
    """Catches a present accelerator, or another maker's, that is not used."""
    monkeypatch.setattr(hardware, "has_cuda_driver", lambda: driver)
    monkeypatch.setattr(hardware, "has_tpu", lambda: tpu)
    monkeypatch.setattr(hardware, "_plugins", lambda: plugins)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", chosen)
        hardware.leave_out_absent()
        assert jax.config.jax_platforms == expected
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("name", ["PJRT_NAMES_AND_LIBRARY_PATHS", "JAX_FORCE_TPU_INIT"])
def test_an_accelerator_that_the_user_names_is_not_left_out(monkeypatch, name):
    """Catches the CPU in place of a TPU that is not on the PCI bus, as in some sandboxes."""
    monkeypatch.setenv(name, "x")
    assert "named by the user" in hardware._plugins()


def test_a_tpu_is_known_by_its_maker(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_PCI", tmp_path)
    for vendor, expected in (("0x10de\n", False), ("0x1ae0\n", True)):
        (tmp_path / vendor.strip()).mkdir()
        (tmp_path / vendor.strip() / "vendor").write_text(vendor)
        hardware.has_tpu.cache_clear()
        assert hardware.has_tpu() == expected
    hardware.has_tpu.cache_clear()
