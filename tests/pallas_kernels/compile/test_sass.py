"""Loops are found in nvdisasm 13.5's output of the streaming matmul, and in synthetic code."""

from pathlib import Path

import pytest

from pallas_kernels.compile.sass import Instruction, parse_sass

STREAM = (Path(__file__).parent / "stream_loop.sass").read_text()


def code(*lines):
    """Synthetic machine code of these instructions and labels."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"   -:-:-:Y:02        /*{address:04x}*/  {line} ")
            address += 16
    return parse_sass("\n".join(text))


def opcodes(iteration):
    return [each.opcode for each in iteration]


def test_instructions():
    """Catches control information, predicates or operands that are parsed as something else."""
    instructions = {each.address: each for each in parse_sass(STREAM).instructions}
    assert instructions[0xC40] == Instruction(0xC40, "!P2", "BRA", "`(.L_x_2)", 5)
    assert instructions[0xC30] == Instruction(
        0xC30, "", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "P2, [UR8], R7", 2
    )
    assert instructions[0xE20].opcode == "HGMMA.64x8x16.F32.BF16"
    assert instructions[0xE20].operands == "R24, gdesc[UR8].tnspA, R24, gsb0"


def test_a_kernel_s_loop():
    """The iteration leaves out the code behind the loop that polls a barrier and jumps back."""
    (iteration,) = parse_sass(STREAM).loops
    assert [each.address for each in iteration] == list(range(0xBC0, 0xEC0, 16))


def test_the_longest_path_of_an_iteration():
    """The iteration has what a branch may skip, and only one of two alternatives."""
    (iteration,) = code(
        *("UMOV", ".a:", "FADD", "@P0 BRA `(.b)", "FMUL", "FMUL", "BRA `(.c)", ".b:", "FFMA"),
        *(".c:", "@P1 BRA `(.a)", "EXIT"),
    ).loops
    assert opcodes(iteration) == ["FADD", "BRA", "FMUL", "FMUL", "BRA", "BRA"]


def test_only_innermost_loops():
    loops = code(
        *(".a:", "IADD3", ".b:", "FADD", "@P0 BRA `(.b)", ".c:", "FMUL", "BRA.U UP0, `(.c)"),
        *("@P1 BRA `(.a)", "EXIT"),
    ).loops
    assert [opcodes(iteration) for iteration in loops] == [["FADD", "BRA"], ["FMUL", "BRA.U"]]


@pytest.mark.parametrize("asks", ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3", "USETMAXREG 0xe8"])
def test_waiting_is_no_loop(asks):
    """A loop that only polls is none; a loop that polls within it remains, with one poll."""
    wait = (".w:", asks, "@!P0 BRA `(.w)")
    assert code(*wait, "EXIT").loops == []
    (iteration,) = code(".a:", "FADD", *wait, "FMUL", "@P1 BRA `(.a)", "EXIT").loops
    assert opcodes(iteration) == ["FADD", asks.split()[0], "BRA", "FMUL", "BRA"]


def test_what_is_never_reached_is_no_loop():
    assert code("FADD", "EXIT", ".a:", "BRA `(.a)", "NOP").loops == []


def test_a_predicated_exit_goes_on():
    (iteration,) = code(".a:", "@P0 EXIT", "FADD", "BRA `(.a)").loops
    assert opcodes(iteration) == ["EXIT", "FADD", "BRA"]
