"""What NVIDIA's assembler, ptxas, says of the kernels of a program, for GPUs present or not."""

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
    """One kernel as assembled.

    Attributes:
        registers: of each thread at the start; warpgroups may trade them later.
        spill_stores, spill_loads: bytes of registers that are kept in memory.
        wgmma: tensor-core instructions.
        warnings: of ptxas, such as that registers are spilled or that products wait for each other.
        sass: its machine code as text, if it was asked for; `pallas_kernels.compile.sass` reads it.
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

    What else the process writes to its standard output meanwhile is lost.

    Args:
        options: as for `lowered.compile`, which afterwards costs nothing with the same.
        disassemble: whether the reports have the machine code.

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
    """Reads what Mosaic GPU prints: of each kernel the PTX, the output of ptxas, and the code."""
    warnings, codes = _WARNING.findall(text), _CODE.findall(text)
    reports, begin = [], 0
    for found in _KERNEL.finditer(text):
        name = found["name"]
        reports.append(
            KernelReport(
                name,
                int(found["registers"]),
                int(found["stores"]),
                int(found["loads"]),
                text.count("wgmma.mma_async.sync", begin, found.start()),
                tuple(line for line in warnings if f"'{name}'" in line or "function '" not in line),
            )
        )
        begin = found.end()
    if [name for name, _ in codes] == [report.name for report in reports]:
        pairs = zip(reports, codes, strict=True)
        return [dataclasses.replace(report, sass=code) for report, (_, code) in pairs]
    return reports


def require_disassembler() -> None:
    """Looks for it where Mosaic GPU does: unlike ptxas, not on PATH.

    Raises:
        CompilerError: if it is not there.
    """
    importlib.import_module("jax.experimental.mosaic.gpu")  # sets the variable
    root = os.environ["MOSAIC_GPU_CUDA_ROOT"]
    if not os.path.exists(os.path.join(root, "bin", "nvdisasm")):
        raise CompilerError(
            f"nvidia-cuda-nvdisasm is not installed in {root}; run pip install "
            "'jaxmoe[absent-gpu]', and unset CUDA_ROOT if that names another toolkit."
        )


def _make_unique(lowered: jax.stages.Lowered) -> int:
    """Gives each kernel a new hash; how many there are.

    Mosaic GPU assembles a kernel once a process, by its hash, and later says nothing of it.
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
            config = {each.name: each.attr for each in call.attributes["mhlo.backend_config"]}
            config["kernel_hash"] = ir.StringAttr.get(os.urandom(32))
            call.attributes["mhlo.backend_config"] = ir.DictAttr.get(config)
    return len(calls)


@contextlib.contextmanager
def _dumping(*names: str) -> Iterator[None]:
    """Mosaic GPU prints what these variables stand for; it reads them at each compilation."""
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
    """A list that gets what is written to standard output, by libraries too."""
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
