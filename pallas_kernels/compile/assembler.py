"""Reports of NVIDIA's assembler, ptxas, on a program's Mosaic GPU kernels, for absent GPUs too."""

import contextlib
import dataclasses
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.mlir import ir

from pallas_kernels.compile.errors import CompilerError

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for .*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_WARNING = re.compile(r"^ptxas (?:warning\b|.*(?:Performance Loss|wgmma)).*", re.MULTILINE)
_CODE = re.compile(r"^//-+ \.text\.(\S+) -+\n(.*?)(?=^//-+ |\Z)", re.MULTILINE | re.DOTALL)
_DUMPS = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_PTX")
_DUMP_CODE = "MOSAIC_GPU_DUMP_SASS_CTRL"


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """The report on one kernel.

    Attributes:
        name: of the kernel's entry function.
        registers: that each thread has at the start; warpgroups may exchange some later.
        spill_stores: bytes that are stored to memory because registers do not suffice.
        spill_loads: bytes that are loaded for the same reason.
        wgmma: number of tensor-core instructions in the PTX.
        warnings: of ptxas, such as that registers are spilled or that wgmma is serialized.
        sass: machine code as text, which `pallas_kernels.compile.sass` parses; "" if not asked for.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    wgmma: int
    warnings: tuple[str, ...]
    sass: str = dataclasses.field(default="", repr=False)


def assembler_reports(
    lowered: jax.stages.Lowered, options: dict, *, disassemble: bool = False
) -> list[KernelReport]:
    """Compiles a program and reports on its Mosaic GPU kernels.

    The process's standard output is captured during compilation: what other threads print is lost.

    Args:
        lowered: the program, which must not have been compiled before.
        options: for `lowered.compile`, which returns the cached program if called with them later.
        disassemble: whether to include the machine code.

    Raises:
        CompilerError: if the assembler was not run for each of the kernels, or a tool is missing.
    """
    if disassemble:
        require_disassembler()
    kernels = _make_unique(lowered)
    with _dumping(*_DUMPS, *([_DUMP_CODE] if disassemble else [])), _captured() as output:
        lowered.compile(options)
    reports = parse_reports(output[0])
    if len(reports) != kernels:
        raise CompilerError(
            f"the assembler reported on {len(reports)} of {kernels} kernels: report on a program "
            "before it is compiled, and without MOSAIC_GPU_DUMP_TO."
        )
    if disassemble and not all(report.sass for report in reports):
        raise CompilerError("nvdisasm gave no machine code: install nvidia-cuda-nvdisasm anew.")
    return reports


def parse_reports(text: str) -> list[KernelReport]:
    """Parses Mosaic GPU's dump: the PTX, ptxas' output and perhaps the machine code per kernel."""
    warnings, codes = _WARNING.findall(text), _CODE.findall(text)
    reports, begin = [], 0
    for kernel in _KERNEL.finditer(text):
        name = kernel["name"]
        reports.append(
            KernelReport(
                name,
                int(kernel["registers"]),
                int(kernel["stores"]),
                int(kernel["loads"]),
                text.count("wgmma.mma_async.sync", begin, kernel.start()),
                tuple(line for line in warnings if f"'{name}'" in line or "function '" not in line),
            )
        )
        begin = kernel.end()
    if [name for name, _ in codes] == [report.name for report in reports]:
        pairs = zip(reports, codes, strict=True)
        return [dataclasses.replace(report, sass=code) for report, (_, code) in pairs]
    return reports


def require_disassembler() -> None:
    """Checks that nvdisasm is installed where Mosaic GPU looks for it, which is not PATH.

    Raises:
        CompilerError: if it is not installed there.
    """
    importlib.import_module("jax.experimental.mosaic.gpu")  # sets MOSAIC_GPU_CUDA_ROOT
    root = os.environ["MOSAIC_GPU_CUDA_ROOT"]
    if not os.path.exists(os.path.join(root, "bin", "nvdisasm")):
        raise CompilerError(
            f"nvidia-cuda-nvdisasm is not installed in {root}; run pip install "
            "'jaxmoe[absent-gpu]', and unset CUDA_ROOT if that names another toolkit."
        )


def _make_unique(lowered: jax.stages.Lowered) -> int:
    """Gives each kernel of the program a new random hash; returns how many kernels there are.

    Mosaic GPU caches assembled kernels by hash for the life of the process, and prints nothing for
    a kernel that is cached.
    """
    calls = []

    def visit(operation):
        target = operation.attributes.get("call_target_name")
        if target is not None and target.value.startswith("mosaic_gpu"):
            calls.append(operation)
        return ir.WalkResult.ADVANCE

    module: Any = lowered.compiler_ir("stablehlo")
    module.operation.walk(visit)
    with module.context:
        for call in calls:
            config = {item.name: item.attr for item in call.attributes["mhlo.backend_config"]}
            config["kernel_hash"] = ir.StringAttr.get(os.urandom(32))
            call.attributes["mhlo.backend_config"] = ir.DictAttr.get(config)
    return len(calls)


@contextlib.contextmanager
def _dumping(*names: str) -> Iterator[None]:
    """Sets these of Mosaic GPU's dump variables, which it reads at each compilation, to 1."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Captures standard output, C++ libraries' too; on exit its text is appended to the list."""
    output: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield output
        finally:
            sys.stdout.flush()
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            output.append(file.read().decode(errors="replace"))
