"""TPU steps of benchmark.py schedule: costs of operations, and their sums, without a compiler."""

import dataclasses
import math
import re

import pytest

from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.schedule import command, tpu, tpu_steps
from jaxmoe.benchmarks.schedule.tpu_steps import (
    Program,
    TpuStep,
    bundles_around,
    bundles_of,
    core_of,
)
from jaxmoe.plan.operations import entry_operations
from jaxmoe.plan.targets import parse_target
from pallas_kernels.compile.bundles import parse_code
from pallas_kernels.compile.paths import whole
from pallas_kernels.compile.tpu_dump import TOP
from pallas_kernels.compile.tpu_schedule import Core
from tests.pallas_kernels.compile.masked_sums import BLOCK, FILE, recorded

CORE = Core.of("v5p", 2, 459e12, 2.765e12)
STEP = TpuStep("v5p-8", "tensor=4", 1_000_000)
BLOCKS = 10
ONCE = 157  # bundles of the recorded kernel if its loop runs once
POOL = 128 * 2**20


def program(layers, *, copies=0, kind="copy"):
    """A step whose layers multiply by ten blocks of keys each, perhaps after copying a pool."""
    lines = [
        "ENTRY %main (q: bf16[8,128]) -> f32[] {",
        f'  %keys = bf16[{BLOCKS},128,128]{{2,1,0}} parameter(0), metadata={{op_name="k"}}',
        f'  %pool = s8[{POOL}]{{0}} parameter(1), metadata={{op_name="cache.layers[0].k"}}',
    ]
    for i in range(layers):
        meta = f'metadata={{op_name="jit(step)/layer_{i}/sums/pallas_call"}}'
        lines += [f"  %copied.{i} = s8[{POOL}]{{0}} {kind}(%pool), {meta}"] * copies
        lines += [
            f'  %sums.{i} = f32[] custom-call(%keys), custom_call_target="x", {meta}',
            f"  %scalar.{i} = f32[] negate(%sums.{i}), {meta}",
        ]
    text = "\n".join([*lines, "  ROOT %last = f32[] copy(%sums.0)", "}"])
    codes = {f"sums.{i}": recorded() for i in range(layers)}
    return text, {TOP: recorded(), **codes}


def test_a_loop_runs_as_often_as_its_bytes_need():
    """The kernel is on one core; its loop copies a block in each iteration, without a mask."""
    (steady, once) = 65, whole(recorded()).run.bundles
    assert once == ONCE
    assert bundles_of("sums", recorded(), BLOCKS * BLOCK, CORE) == (once + 9 * steady, 0)
    assert bundles_of("sums", recorded(), BLOCKS * BLOCK + 4, CORE) == (once + 9 * steady, 0)
    assert bundles_of("sums", recorded(), 0, CORE) == (once, 0)


def test_cost_of_operations():
    """The longer one of bundles and bytes counts, for each operation; scalars take neither."""
    text, codes = program(1, copies=1)
    each = Program(text, codes, 1.0, CORE)
    copy, sums, scalar, _ = (each.cost([x]) for x in each.operations)
    assert copy == tpu_steps.Cost(0, 2 * POOL, 2 * POOL / CORE.bandwidth)
    bundles = ONCE + (BLOCKS - 1) * 65
    assert sums == tpu_steps.Cost(bundles, BLOCKS * BLOCK + 4, bundles / CORE.clock)
    assert scalar.nbytes == 8 and scalar.bundles == 0
    seconds = each.seconds
    assert seconds["operations"] == pytest.approx(copy.seconds + sums.seconds, rel=1e-6)
    assert seconds["bundles"] == bundles / CORE.clock
    assert seconds["between"] == pytest.approx(ONCE / CORE.clock)


@pytest.mark.parametrize(("kind", "copies"), [("copy", 3), ("reshape", 3), ("fusion", 0)])
def test_copies_of_pools(kind, copies):
    """Also to another layout, and wherever the compiler says that they come from."""
    text, codes = program(3, copies=1, kind=kind)
    assert Program(text.replace("/layer_", "/"), codes, 1.0, CORE).pool_copies == copies


def test_a_loop_of_operations_counts_once():
    text, codes = program(1)
    each = Program(text, codes, 1.0, CORE)
    (operation, *_) = entry_operations(text)
    inside = dataclasses.replace(operation, kind="while", inside=(operation, operation))
    assert each.cost([inside]).loops == 1
    assert each.cost([inside]).bundles == 2 * each.cost([operation]).bundles


def test_a_loop_whose_copies_no_one_knows_counts_once():
    """Catches a division by the bytes of copies whose sizes are in registers."""
    texts = [FILE.with_suffix(x).read_text() for x in (".bundles", ".utilization")]
    in_registers = re.sub(r"(/\*size_in_granules=\*/)\d+", r"\1%s9_s9", texts[0])
    assert bundles_of("sums", parse_code(in_registers, texts[1]), 10 * BLOCK, CORE) == (ONCE, 1)


def test_a_hot_loop_that_something_else_counts():
    """Its bundles take the place of those that it has if it runs once."""
    (loop,) = whole(recorded()).inner
    assert bundles_around(recorded(), None) == (ONCE, 1)
    assert bundles_around(recorded(), 1000) == (ONCE - loop.longest.work.bundles + 1000, 0)


@pytest.mark.absent_tpu
def test_figures_of_a_step(monkeypatch):
    """What a further layer adds, beside the plan's bound of it."""
    monkeypatch.setattr(
        tpu_steps, "dumped", lambda compile_program, step, layers: program(layers, copies=2)
    )
    figures = command.schedule(parse_target("v5p-8"), [STEP], None)
    (step,) = figures["steps"]
    assert step["a_layer"] == {"copy": 2, "custom-call": 1, "negate": 1}
    assert step["pool_copies"] == 2
    assert step["by_layer"] == {"local, moe": 4, "global, moe": 4}
    bundles = (ONCE + 9 * 65) / CORE.clock
    expected = 2 * 2 * POOL / CORE.bandwidth + bundles
    assert step["seconds"]["operations"] == pytest.approx(expected, rel=1e-6)
    assert step["seconds"]["between"] == 0
    assert 90e-6 < step["seconds"]["plan"] < 120e-6
    copies, sums, _ = step["most_expensive"]
    assert (copies["operation"], copies["a_layer"], copies["bundles"]) == ("copied", 2, 0)
    assert sums["bundles"] == ONCE + 9 * 65 and math.isclose(sums["seconds"], bundles)
    (row,) = tables.tpu_steps_grid(figures).rows
    assert row[:10] == ["scout, v5p-8, 1M", "4", "1", "0", "2", "0", "0", "0", "1", "2"]
    first, *_ = tables.operations_grid(figures).rows
    assert first[1:4] == ["copied", "", "2"]


@pytest.mark.absent_tpu
def test_figures_of_a_chunk_of_prefill(monkeypatch):
    """Beside the plan's bound on compute; a kernel without a rule takes what its code says."""
    monkeypatch.setattr(tpu_steps, "dumped", lambda compile_program, step, layers: program(layers))
    chunk = TpuStep("v5p-16", "tensor=8", 1_000_000, tokens=8192)
    figures = command.schedule(parse_target("v5p-8"), [chunk], None)
    (step,) = figures["steps"]
    assert (step["name"], step["bound"]) == ("prefill-scout-v5p-16", "compute")
    seconds = step["seconds"]
    assert seconds["bundles"] == pytest.approx(ONCE / CORE.clock)
    assert seconds["plan"] == pytest.approx(12.92e-3, rel=1e-3)
    assert seconds["links"] == pytest.approx(1.223e-3, rel=1e-3)
    (row,) = tables.tpu_steps_grid(figures).rows
    assert row[0] == "scout, v5p-16, 8,192 of 1M" and row[-2] == "12922.9"


def test_a_step_that_fails_is_recorded(monkeypatch):
    def fails(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(TpuStep, "figures", fails)
    figures = {"kernels": [], "steps": [tpu.figures(parse_target("v5p-8"), STEP)]}
    assert tables.schedule_errors(figures) == ["step-scout-v5p-8: RuntimeError: no room"]
    assert not tables.tpu_steps_grid(figures).rows and not tables.operations_grid(figures).rows


@pytest.mark.absent_tpu
def test_cores_of_slices():
    assert core_of(parse_target("v5p-16")) == CORE
    assert core_of(parse_target("v6e-4")).cores == 1
