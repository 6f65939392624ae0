"""Which assembler makes the kernels: the one that was checked, whatever else is on PATH."""

import functools
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptxas
from pallas_kernels.attention import flash_attention
from pallas_kernels.compile.absent import absent_h100s, compiler_options, lower_for
from pallas_kernels.compile.assembler import assembler_reports

pytestmark = pytest.mark.absent_gpu

KERNEL = "flash_attention_forward_mosaic_gpu_kernel"


def logging_toolkit(folder: Path, real: str) -> Path:
    """A toolkit whose ptxas notes its arguments and then runs `real`."""
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "ptxas"
    log = shlex.quote(str(folder / "log"))
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {real} "$@"\n')
    program.chmod(0o755)
    return folder


def assembled(folder: Path) -> int:
    """How many programs a logging toolkit assembled."""
    log = folder / "log"
    return sum(" -o " in line for line in log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A toolkit with an older ptxas, first on PATH."""
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    fake.chmod(0o755)
    folder = logging_toolkit(tmp_path / "old", str(fake))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def pinned(tmp_path):
    """The package's ptxas, logged."""
    return logging_toolkit(tmp_path / "pinned", f"{ptxas.packaged_toolkit()}/bin/ptxas")


def lower(**options):
    (device,) = absent_h100s(1)
    x = jax.ShapeDtypeStruct((1, 1, 128, 64), "bfloat16")
    return lower_for(device, lambda x: flash_attention(x, x, x, scale=1.0, **options), x)


def in_a_new_process(function, *arguments: str) -> None:
    """Mosaic GPU looks for ptxas once a process, and other tests may have assembled in this one."""
    call = f"from {__name__} import {function.__name__} as f; f(*{arguments!r})"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", f"import tests.conftest; {call}"], check=True, cwd=root)


def assemble_with(toolkit: str) -> None:
    """Assembles a kernel where the package is `toolkit`."""
    ptxas.packaged_toolkit = lambda: toolkit
    (report,) = assembler_reports(lower(implementation="mosaic_gpu"), compiler_options())
    assert report.name == KERNEL
    checked = ptxas.select()
    assert checked == f"{toolkit}/bin/ptxas"
    assert ptxas.version(checked) >= ptxas.OLDEST


def test_kernels_are_assembled_by_the_one_that_was_checked(old, pinned):
    """Catches a check of one assembler and the use of another."""
    in_a_new_process(assemble_with, str(pinned))
    assert (assembled(pinned), assembled(old)) == (1, 0)


def assemble_another_kernel_first() -> None:
    """Assembles a kernel that is not this project's, and then one that is."""
    (device,) = absent_h100s(1)
    x = jax.ShapeDtypeStruct((128,), "float32")

    @functools.partial(plgpu.kernel, out_type=x)
    def copy(source, target):
        target[...] = source[...]

    lower_for(device, copy, x).compile(compiler_options())
    assert len(assembler_reports(lower(implementation="mosaic_gpu"), compiler_options())) == 1


def test_importing_the_kernels_chooses(old):
    """Catches a choice at our first kernel: the process may have assembled another's by then."""
    in_a_new_process(assemble_another_kernel_first)
    assert assembled(old) == 0


def test_without_the_package_an_older_one_is_refused(old, monkeypatch):
    monkeypatch.setattr(ptxas, "packaged_toolkit", lambda: None)
    with pytest.warns(UserWarning, match="not used"), pytest.raises(ValueError) as error:
        lower(implementation="mosaic_gpu")
    assert "ptxas 13.3 or newer, and JAX would use 13.0 at " + str(old) in str(error.value)
    with pytest.warns(UserWarning, match=r"pip install 'nvidia-cuda-nvcc>=13\.3'\.$"):
        assert "mosaic_gpu" not in lower().as_text()
    assert assembled(old) == 0


def test_a_local_one_that_mosaic_would_take_first_is_refused(old, tmp_path, monkeypatch):
    """./cuda_sdk_lib comes before PATH."""
    (tmp_path / "cuda_sdk_lib").symlink_to(old)
    monkeypatch.chdir(tmp_path)
    assert "at cuda_sdk_lib/bin/ptxas; remove cuda_sdk_lib" in str(ptxas.why_not())


def test_none_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(ptxas, "packaged_toolkit", lambda: None)
    monkeypatch.setattr(ptxas, "_SYSTEM", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "JAX would use none" in str(ptxas.why_not())


def test_the_pinned_one_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ptxas.why_not() is None
