"""Bounds of loops: of synthetic iterations, and of a kernel compiled for an absent GPU."""

import functools

import jax
import pytest

from pallas_kernels.attention import flash_attention
from pallas_kernels.compile.absent import absent_h100s, compiler_options, lower_for
from pallas_kernels.compile.assembler import KernelReport, assembler_reports
from pallas_kernels.compile.sass import Instruction
from pallas_kernels.compile.schedule import HotLoop, Processor, hot_loops
from tests.pallas_kernels.compile.test_sass import STREAM

H100 = Processor.of(132, 989e12, 3.35e12)
WAIT_1, WAIT_0 = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"
EX2 = "MUFU.EX2 R1, R2"


def loop(*lines, element=None):
    parts = [line.partition(" ") for line in lines]
    iteration = tuple(Instruction(16 * i, "", op, rest, 1) for i, (op, _, rest) in enumerate(parts))
    return HotLoop("", iteration, element)


def test_processor():
    """The clock is that at which 4,096 operations per cycle give the vendor's figure."""
    assert H100.clock == pytest.approx(1.829e9, rel=1e-3)
    assert H100.per_second(4096) == pytest.approx(989e12)


def test_counts_and_cycles():
    """Catches a resource whose instructions are left out or counted for another one."""
    iteration = loop(
        *[PRODUCT, f"{PRODUCT}, gsb0", "QGMMA.64x64x32.F32.E4M3.E4M3 R1, gdesc[UR8], R1"],
        *[EX2, "FFMA R1, R2, R3, R4", "IMAD.MOV.U32 R1, RZ, RZ, R2", "FSEL R1, R2, R3, P0"],
        *["F2FP.BF16.F32.PACK_AB R1, R2, R3", "HADD2.F32 R1, -RZ, R2.H0_H0", "I2F.S8 R1, R2"],
        *["LDS R1, [R2]", "LD.E R1, desc[UR4][R2.64]", "SHFL.BFLY PT, R1, R2, 0x1, 0x1f"],
        *["BAR.SYNC 0x1", "UIADD3 UR4, UR4, 0x1, URZ"],
    )
    nonzero = {kind: count for kind, count in iteration.counts.items() if count}
    once = ["mufu", "fma", "imad", "alu", "convert_slowly", "shared", "global", "shuffle"]
    assert nonzero == {"slots": 15, "products": 3, "convert": 2, "barrier": 1} | dict.fromkeys(
        once, 1
    )
    assert iteration.cycles(H100) == {
        "issue": 15,
        "tensor": 64 + 64 + 32,
        "alu": 2 + 2,
        "fma": 1 + 2 + 2,
        "mufu": 8 + 8,
        "load/store": 3 * 4,
    }


@pytest.mark.parametrize("element", [2, 1, 0.5])
def test_memory(element):
    """A product reads 64 rows; ALU instructions, not issue slots, bound the rate of reading."""
    iteration = loop(PRODUCT, PRODUCT, *["LOP3.LUT"] * 98, element=element)
    assert iteration.read_bytes == 2 * 64 * 16 * element
    assert iteration.cycles(H100)["memory"] * 3.35e12 / H100.clock / 132 == pytest.approx(
        iteration.read_bytes
    )
    at_once = iteration.read_bytes / (98 * 2) * H100.clock * 132  # ALU takes 2 cycles, issuing 1
    assert iteration.read_rate(H100) == pytest.approx(at_once)


def test_what_lies_between_waits():
    """Exponentials before the first wait count as following the last wait, in a circle."""
    iteration = loop(
        EX2, PRODUCT, f"{PRODUCT}, gsb0", WAIT_1, EX2, EX2, f"{PRODUCT}, gsb0", WAIT_0, EX2
    )
    assert iteration.between_waits == [
        {"running": 1, "products": 1, "mufu": 2},
        {"running": 0, "products": 2, "mufu": 2},
    ]
    assert iteration.mufu_under_products == 2


@pytest.mark.parametrize(
    "lines, under",
    [
        ([f"{PRODUCT}, gsb0", EX2, WAIT_0], 1),
        ([f"{PRODUCT}, gsb0", WAIT_0, EX2], 0),
        ([EX2, WAIT_0, EX2, f"{PRODUCT}, gsb0"], 1),  # begun in the previous iteration
        ([PRODUCT, EX2, f"{PRODUCT}, gsb0", WAIT_0], 1),  # runs before its group is complete
        ([f"{PRODUCT}, gsb0", WAIT_1, EX2], 1),
        ([EX2], 0),
    ],
)
def test_exponentials_under_products(lines, under):
    assert loop(*lines).mufu_under_products == under


def test_a_kernel_s_loop():
    report = KernelReport("stream", 30, 0, 0, 4, (), STREAM)
    (iteration,) = hot_loops(report, element=2)
    assert (iteration.name, iteration.counts["slots"], iteration.counts["products"]) == ("", 48, 4)
    assert iteration.cycles(H100)["tensor"] == 4 * 8 / 2
    assert iteration.cycles(H100)["memory"] == max(iteration.cycles(H100).values())


def attention():
    """Attention for an absent GPU, with a loop for masked blocks and one for the others."""
    attend = functools.partial(flash_attention, scale=1.0, implementation="mosaic_gpu")
    shape = jax.ShapeDtypeStruct((1, 1, 256, 128), "bfloat16")
    return lower_for(*absent_h100s(1), lambda x: attend(x, x, x), shape)


@pytest.mark.absent_gpu
def test_a_compiled_kernel():
    """An iteration of 64 queries and 128 keys has 64 exponentials per lane and two of maxima."""
    (report,) = assembler_reports(attention(), compiler_options(), disassemble=True)
    unmasked, masked = hot_loops(report)
    assert (unmasked.name, masked.name) == ("", "masked")
    for iteration in (unmasked, masked):
        assert iteration.counts["mufu"] == 64 + 2
        assert iteration.cycles(H100)["tensor"] == 2 * 64 * 128 * 128 * 2 / 4096
        assert sum(part["mufu"] for part in iteration.between_waits) == 66
    assert unmasked.counts["slots"] < masked.counts["slots"]


@pytest.mark.absent_gpu
def test_no_code_unless_asked_for():
    (report,) = assembler_reports(attention(), compiler_options())
    assert report.sass == ""
