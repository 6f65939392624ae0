"""benchmark.py schedule: its cases, figures, tables and mistakes."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from benchmarks import write_tables
from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.schedule import command, gpu, tpu
from jaxmoe.benchmarks.schedule.cases import OURS, Case, all_cases
from jaxmoe.benchmarks.schedule.steps import Step
from jaxmoe.benchmarks.schedule.tpu_cases import TpuCase
from jaxmoe.errors import UserError
from jaxmoe.plan import scheduled
from jaxmoe.plan.targets import parse_target
from pallas_kernels.attention import flash_attention
from tests.pallas_kernels.compile.masked_sums import BLOCK, masked_sums
from tests.scripts import refuses, succeeds

ROOT = Path(__file__).parents[2]
FIGURES = {
    name: json.loads((ROOT / "benchmarks" / f"schedule-{name}.json").read_text())
    for name in ("h100", "v5p", "v6e")
}
H100, V5P = parse_target("h100x1"), parse_target("v5p-8")


def cases_of(name):
    target = command._target(name)
    return command.suite_of(target).all_cases(target)


def test_list_names_the_cases():
    stdout, _ = succeeds("benchmark.py", "schedule", "--list", "--cases", "*-d[qk]*")
    names = "flash-dq", "flash-dq-attention_mgpu", "flash-dkv", "flash-dkv-attention_mgpu"
    assert stdout.split() == [*names]


def test_list_names_the_cases_of_a_tpu():
    stdout, _ = succeeds("benchmark.py", "schedule", "--target", "v6e", "--list")
    assert "decode-int8-ragged_paged_attention" in stdout and "flash-dq" not in stdout


@pytest.mark.parametrize("target", command.TARGETS)
def test_names_are_one_to_one(target):
    names = [case.name for case in cases_of(target)]
    assert len(set(names)) == len(names) > 10


@pytest.mark.parametrize("target", ["v5p-8", "b200", "h100x8"])
def test_other_targets_are_refused(target):
    with pytest.raises(UserError, match=f"--target {target} is not served: .* h100, .* v6e"):
        command._target(target)


def test_mistakes_are_one_line():
    refuses("benchmark.py", "schedule", "--target", "b200", words=["--target b200", "h100"])
    refuses("benchmark.py", "schedule", "--cases", "nothing", words=["'nothing'", "--list"])


def test_a_missing_tool_is_named(monkeypatch):
    def missing():
        raise UserError("nvidia-cuda-nvdisasm is not installed")

    monkeypatch.setattr(gpu, "require_disassembler", missing)
    with pytest.raises(UserError, match="nvdisasm"):
        command.schedule(H100, [], None)


def small(by=OURS, **changes):
    """Attention of attention: the last of two kernels is meant."""
    shape = jax.ShapeDtypeStruct((1, 1, 128, 64), "bfloat16")

    def function(x):
        inner = flash_attention(x, x, x, scale=1.0, implementation="mosaic_gpu")
        return flash_attention(inner, x, x, scale=1.0, implementation="mosaic_gpu")

    return dataclasses.replace(Case("small", by, function, (shape,)), **changes)


@pytest.mark.absent_gpu
def test_figures_are_written_after_every_case(tmp_path, monkeypatch):
    """Also of one that fails, which does not end the run."""
    output = tmp_path / "figures.json"
    counted = []
    write = command.write_json

    def counting(path, figures):
        write(path, figures)
        counted.append(len(json.loads(output.read_text())["kernels"]))

    def fails(x):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(command, "write_json", counting)
    cases = [small(), small("other", function=fails)]
    figures = command.schedule(H100, cases, str(output))
    assert counted == [1, 2] and json.loads(output.read_text()) == figures
    assert "not a measurement" in figures["static"]
    done, failed = figures["kernels"]
    assert [loop["name"] for loop in done["loops"]] == ["", "masked"]
    assert failed["error"] == "RuntimeError: no such kernel"
    assert [row[:2] for row in tables.schedule_grid(figures).rows] == [
        ["small", OURS],
        ["small, masked", OURS],
    ]


def small_tpu(**changes):
    """The small kernel of tests/pallas_kernels/compile/masked_sums.py."""
    shapes = ((3,), "int32"), ((8, 128), "bfloat16"), ((64, 128, 128), "bfloat16")
    shapes = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    case = TpuCase("small", OURS, masked_sums, shapes, block="128 keys", copied=BLOCK)
    return dataclasses.replace(case, **changes)


@pytest.mark.absent_tpu
def test_figures_of_tpu_kernels(tmp_path):
    """A case that fails, here for want of copies, does not end the run."""
    output = tmp_path / "figures.json"
    cases = [small_tpu(useful=BLOCK / 2), small_tpu(by="other", copied=2 * BLOCK)]
    figures = command.schedule(command._target("v5p"), cases, str(output))
    assert json.loads(output.read_text()) == figures
    done, failed = figures["kernels"]
    assert "waits for copies" in failed["error"]
    assert done["one_core"] and [path["name"] for path in done["paths"]] == ["", "masked"]
    steady, masked = done["paths"]
    assert steady["cycles"] == {"bundles": 65, "products": 0, "memory": pytest.approx(20.75, 1e-3)}
    assert steady["bound_by"] == "bundles" and steady["busiest"] == "SALU"
    assert masked["bundles"] == ["0x32-0x55", "0x65-0x6c", "0x6d-0x7d", "0x7e-0x83"]
    rate = BLOCK / 2 / 65 * figures["core"]["clock"] / 1e12
    assert tables.bundles_grid(figures).rows == [
        ["small", "jaxmoe, one core", "128 keys", "65", "", "21", "SALU 23", "0", "bundles",
         f"{rate:.2f}", ""],
        ["small, masked", "jaxmoe, one core", "128 keys", "67", "", "21", "SALU 23", "0", "bundles",
         f"{rate * 65 / 67:.2f}", ""],
    ]  # fmt: skip


def test_a_run_of_some_cases_keeps_the_others(tmp_path, monkeypatch):
    """In their order, unless they are gone or of other versions."""
    output = tmp_path / "figures.json"
    first, second, third, *_ = (x for x in cases_of("v5p") if isinstance(x, TpuCase))
    header = command._header(V5P, command.suite_of(V5P))
    kept = [{"name": "gone"}, {"name": third.name, "old": 1}, {"name": second.name, "old": 2}]
    output.write_text(json.dumps(header | {"kernels": kept, "steps": []}))
    monkeypatch.setattr(tpu, "figures", lambda target, case: {"name": case.name})
    figures = command.schedule(V5P, [first, third], str(output))
    assert json.loads(output.read_text()) == figures
    assert figures["kernels"] == [{"name": first.name}, kept[2], {"name": third.name}]
    header["versions"]["libtpu"] = "0.0.1"
    output.write_text(json.dumps(header | {"kernels": kept, "steps": []}))
    with pytest.raises(UserError, match=r"figures of other versions, .*0\.0\.1.*: analyze all"):
        command.schedule(V5P, [first], str(output))
    figures = command.schedule(V5P, cases_of("v5p"), str(output))
    assert figures["kernels"][1] == {"name": second.name}


@pytest.mark.absent_gpu
def test_the_last_kernel_is_meant():
    """Catches JAX's kernels without names that are taken for one another."""
    (dq,) = [case for case in all_cases() if case.name == "flash-dq-attention_mgpu"]
    kernel = command.schedule(H100, [dq], None)["kernels"][0]
    (loop,) = kernel["loops"]
    assert loop["counts"]["products"] == 20  # of dkv, 24


def test_operations_of_a_step(monkeypatch):
    """What a further layer adds, and that by kind of layer."""

    def compiled(self, gpu, layers):
        assert gpu == "h100"
        lines = ["ENTRY %main (x: f32[]) -> f32[] {", "  %x = f32[] parameter(0)"]
        for i in range(layers):
            meta = f'metadata={{op_name="jit(step)/layer_{i}/add"}}'
            lines += [f"  %sum.{i} = f32[] fusion(%x), {meta}"] * (1 + i % 2)
        return "\n".join([*lines, "  %last = f32[] copy(%x)", "}"])

    monkeypatch.setattr(Step, "compiled", compiled)
    figures = Step("maverick", 1).figures(H100)
    assert figures["a_layer"] == {"fusion": 1.5}
    assert figures["by_layer"] == {"local, dense": 1, "local, moe": 2, "global, moe": 2}


def test_the_document_is_made_from_the_figures():
    text = (ROOT / "docs" / "schedule.md").read_text()
    assert write_tables.filled(text) == text
    assert write_tables.schedule_markdown(FIGURES["h100"]) in text
    for name in ("v5p", "v6e"):
        assert write_tables.bundles_markdown(FIGURES[name]) in text


def test_the_plan_has_the_figures():
    assert scheduled.FILE.read_text() == write_tables.schedule_factors()


@pytest.mark.parametrize("target", FIGURES)
def test_all_cases_have_figures(target):
    """Catches a case that was added, and figures that were not made anew."""
    each = [*FIGURES[target]["kernels"], *FIGURES[target]["steps"]]
    assert [x["name"] for x in each] == [case.name for case in cases_of(target)]
    failed = [x["name"] for x in each if "error" in x]
    served = [name for name in failed if "int4" not in name and "ragged_paged" not in name]
    assert not served and (target != "h100" or not failed)
