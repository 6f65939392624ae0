"""Bounds of hot paths: of a recorded kernel, of changed ones, and of one compiled for a TPU."""

import dataclasses
import os

import pytest

from pallas_kernels.compile.bundles import parse_code
from pallas_kernels.compile.errors import CompilerError
from pallas_kernels.compile.paths import whole
from pallas_kernels.compile.tpu_dump import TOP, dumped
from pallas_kernels.compile.tpu_schedule import Core, hot_loop, hot_paths
from tests.pallas_kernels.compile.masked_sums import BLOCK, FILE, compile_sums, recorded

V5P, V6E = Core.of("v5p", 2, 459e12, 2.765e12), Core.of("v6e", 1, 918e12, 1.64e12)
NAME = "masked_sums.1"


def test_cores():
    """The clock is that at which the matrix units reach the vendor's figure: 1.75 GHz on both."""
    assert V5P.clock == pytest.approx(1.751e9, rel=1e-3)
    assert V6E.clock == V5P.clock
    assert V5P.bytes_per_cycle == pytest.approx(789.6, abs=0.1)
    assert V6E.bytes_per_cycle == pytest.approx(936.6, abs=0.1)


def test_paths_of_a_recorded_kernel():
    steady, dearest = hot_paths(recorded(), BLOCK)
    assert (steady.name, dearest.name) == ("", "dearest")
    assert steady.addresses == ["0x32-0x55", "0x56-0x64", "0x65-0x6c", "0x7e-0x83"]
    assert dearest.addresses == ["0x32-0x55", "0x65-0x6c", "0x6d-0x7d", "0x7e-0x83"]
    assert (steady.work.bundles, dearest.work.bundles) == (65, 67)
    assert steady.units["SALU"] == 46 / 2 and steady.units["VALU"] == 9 / 4
    assert steady.spills == 0


def test_copies_that_no_path_waits_for():
    with pytest.raises(CompilerError, match=f"waits for copies of {BLOCK + 1} bytes"):
        hot_paths(recorded(), BLOCK + 1)


def test_cycles():
    """A kernel on one core of two has the whole bandwidth, and half of the rate."""
    (alone, _) = hot_paths(recorded(), BLOCK, 131072 * 100)
    assert alone.cycles(V5P) == {
        "bundles": 65,
        "products": 100,
        "memory": BLOCK / V5P.bytes_per_cycle / 2,
    }
    assert alone.per_second(V5P, 50) == pytest.approx(V5P.clock / 2)
    texts = [FILE.with_suffix(x).read_text() for x in (".bundles", ".utilization")]
    code = parse_code(texts[0].replace("megacore core id", ""), texts[1])
    both = dataclasses.replace(alone, code=code)
    assert both.cycles(V5P)["memory"] == 2 * alone.cycles(V5P)["memory"]
    assert both.per_second(V5P, 50) == pytest.approx(V5P.clock)


def test_spills_and_products_of_a_path():
    """A branch with few products is no path of its own."""
    texts = [FILE.with_suffix(x).read_text() for x in (".bundles", ".utilization")]
    rows = texts[1].splitlines()
    rows[4 + 0x57] = "0 0 0 0 0 0 2 0 1 0"
    more = texts[0].replace(
        "0x57   : > {", "0x57   : > { %1 = vmatmul.bf16 %v1  ;;  %2 = vmatmul.bf16 %v1  ;; "
    )
    (path,) = hot_paths(parse_code(more, "\n".join(rows)), BLOCK)
    assert path.spills == 3 and path.work.products == 3


def test_a_code_without_products_has_no_hot_loop():
    texts = [FILE.with_suffix(x).read_text() for x in (".bundles", ".utilization")]
    code = parse_code(texts[0].replace("vmatmul", "vadd"), texts[1])
    assert hot_loop(code).body == whole(code).body


@pytest.mark.absent_tpu
def test_a_compiled_kernel():
    """The whole way through libtpu; its code is what was recorded."""
    text, codes = dumped(compile_sums, "v5p:2x2x1")
    assert NAME in text and NAME in whole(codes[TOP]).run.calls
    paths, expected = (hot_paths(code, BLOCK) for code in (codes[NAME], recorded()))
    assert [path.work for path in paths] == [path.work for path in expected]
    assert [path.addresses for path in paths] == [path.addresses for path in expected]
    assert "LIBTPU_INIT_ARGS" not in os.environ


def test_a_process_that_ends():
    """As libtpu does when it fails."""
    with pytest.raises(CompilerError, match="ended the process"):
        dumped(os._exit, 1)


def test_a_compiler_that_writes_nothing():
    with pytest.raises(CompilerError, match="wrote no bundles"):
        dumped(int)
