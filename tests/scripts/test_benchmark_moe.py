"""benchmark.py moe, as far as it goes without a GPU."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import write_tables
from jaxmoe.benchmarks import gpu, tables
from jaxmoe.benchmarks.checks import TOLERANCE, largest_error, outcome
from jaxmoe.benchmarks.moe import calls, cases, checks, ways
from jaxmoe.benchmarks.moe.calls import Arguments, arguments, builders, only_longest
from jaxmoe.benchmarks.moe.cases import Case, all_cases, matrix_bytes, matrix_shape
from jaxmoe.benchmarks.moe.checks import FULL, TOY, checks_of, errors
from jaxmoe.benchmarks.moe.inputs import random_inputs, random_matrix
from jaxmoe.benchmarks.moe.routing import group_sizes
from jaxmoe.benchmarks.moe.suite import SUITE
from jaxmoe.benchmarks.moe.ways import Blocks, Dense, Ragged
from jaxmoe.benchmarks.tables import ROUTINGS
from jaxmoe.benchmarks.timing import Effort
from jaxmoe.cli import benchmark
from jaxmoe.config import MAVERICK, SCOUT
from jaxmoe.errors import UserError
from jaxmoe.model.moe import route
from pallas_kernels.compile.absent import absent_h100s, lower_for
from pallas_kernels.experts import block_rows, grouped_xla
from tests.scripts import refuses, succeeds

TINY = dataclasses.replace(SCOUT, hidden_size=128, intermediate_size=64, num_local_experts=4)


@pytest.fixture
def tiny(monkeypatch):
    """Makes cases of a model that a CPU is fast enough for."""
    monkeypatch.setitem(cases.MODELS, "tiny", TINY)
    return lambda part, tokens=24, routing="skewed", format="bf16": Case(
        f"{part}-tiny-{tokens}-{routing}", part, "tiny", tokens, routing, format
    )


@pytest.fixture
def command(monkeypatch):
    """`benchmark.py moe` in this process."""

    def run(*options):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "moe", *options])
        benchmark.main()

    return run


def test_list_names_the_cases(command, capsys):
    command("--list", "--cases", "gated-scout-*-random*")
    names = capsys.readouterr().out
    sizes = (
        "1",
        "1-int8",
        "1-fp8",
        "1-int4",
        "64",
        "64-int8",
        "64-fp8",
        "64-int4",
        "1k",
        "8k",
        "64k",
    )
    listed = [re.sub("(-int8|-fp8|-int4)?$", r"-random\1", size, count=1) for size in sizes]
    assert names.split() == [f"gated-scout-{name}" for name in listed]


@pytest.mark.parametrize("format", cases.MATRIX_FORMATS)
@pytest.mark.parametrize("name", ["gate", "down"])
def test_matrices_are_as_large_as_counted(name, format):
    config = dataclasses.replace(TINY, hidden_size=512, intermediate_size=256)
    matrix = random_matrix(config, name, format, jax.random.key(0))
    assert matrix.shape == matrix_shape(config, name)
    assert sum(x.nbytes for x in jax.tree.leaves(matrix)) == matrix_bytes(config, name, format)


@pytest.mark.parametrize("part", ["down", "dw", "layer"])
def test_inputs_are_as_large_as_counted(tiny, part):
    case = tiny(part)
    weights = sum(x.nbytes for x in jax.tree.leaves(random_inputs(case).weights))
    tokens = 3 * case.tokens * (TINY.hidden_size + TINY.intermediate_size) * 2
    assert case.memory == weights * (2 if part == "dw" else 1) + tokens


def test_the_router_chooses_as_the_case_says(tiny):
    case = tiny("layer", tokens=200)
    inputs = random_inputs(case)
    routing = route(TINY, inputs.weights["router"], inputs.x[None], jnp.ones((1, 200), bool))
    assert np.array_equal(routing.expert[0, :, 0], case.experts)


def test_the_longest_group_alone(tiny):
    case = tiny("gated")
    alone = only_longest(case, random_inputs(case))
    expert = Blocks(4, "xla").plan(alone.experts[0])
    assert sorted(expert.group_sizes) == [0, 0, 0, np.bincount(case.experts).max()]


def by_token(way, a, part):
    """Results in the order of tokens."""
    out = calls._PARTS[part](way, a)
    return out if part in ("routed", "layer") else way.back(a.plan, out)


def assert_close(found, wanted):
    assert largest_error(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("part", ["gated", "routed", "layer"])
def test_ragged_dot_computes_the_same(tiny, part):
    case = tiny(part)
    inputs = random_inputs(case)
    ours, theirs = (
        by_token(way, arguments(case, inputs, way, 0), part)
        for way in (Blocks(4, "xla"), Ragged(4))
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("part", ["dx", "dw"])
def test_gradients_of_ragged_dot_are_the_same(tiny, part):
    case = tiny(part)
    inputs = random_inputs(case)
    x, dy = inputs.x[:, :64], inputs.x[::-1]
    results = []
    for way in (Blocks(4, "xla"), Ragged(4)):
        plan = way.plan(inputs.experts[0])
        a = Arguments(inputs.weights, plan, way.rows(plan, x), dy=way.rows(plan, dy))
        found = calls._PARTS[part](way, a)
        results.append(way.back(plan, found) if part == "dx" else found["down"])
    assert_close(*results)


@pytest.mark.reads_compiled
@pytest.mark.parametrize("part", ["gated", "down", "dx", "dw", "routed"])
@pytest.mark.parametrize("routing", ["balanced", "worst"])
def test_dense_products_are_of_equal_work(tiny, part, routing):
    """Counted by XLA, which adds a little for what is no product."""
    case = tiny(part, tokens=64, routing=routing)
    way = Dense(4, case.active)
    a = arguments(case, random_inputs(case), way, 0)
    cost = jax.jit(lambda a: calls._PARTS[part](way, a)).lower(a).compile().cost_analysis()
    assert 1 <= cost["flops"] / case.work["TFLOP/s"] < 1.1
    weights = sum(x.nbytes for x in a.weights["experts"].values())
    assert part == "dw" or weights == case.work["TB/s"]


def test_sets_have_weights_of_their_own(tiny):
    inputs = random_inputs(tiny("down", tokens=1, routing="random"))
    w = inputs.weights["experts"]["down"]
    inputs.weights["experts"]["down"] = w * jnp.arange(4, dtype=w.dtype)[:, None, None]
    found = [Dense(4, 1).weights(inputs.weights, i)["experts"]["down"] for i in range(3)]
    assert [float(x.max() / w.max()) for x in found] == [0, 1, 2]


def test_contenders(tiny):
    def names(part, format="bf16"):
        case = tiny(part, tokens=2, routing="worst", format=format)
        return set(builders(case, random_inputs(case), "xla"))

    assert names("dw") == {"jaxmoe", "xla", "ragged", "dense", "longest"}
    assert names("gated", "int4") == {"jaxmoe", "xla", "longest"}
    assert names("move") == names("layer") == {"jaxmoe", "xla", "ragged"}


def test_checks_have_every_size_of_block(monkeypatch):
    hopper = dataclasses.make_dataclass("Target", ["is_hopper"])(True)
    monkeypatch.setattr("pallas_kernels.experts.group_metadata.target", lambda: hopper)
    cases = {case.config.num_local_experts: case for case in all_cases()}
    assert set(cases) == {SCOUT.num_local_experts, MAVERICK.num_local_experts}
    used = {block_rows(case.tokens, case.config.num_local_experts) for case in all_cases()}
    checked = {check.tokens for check in checks_of("gated", FULL)}
    assert used <= {block_rows(tokens, FULL.experts) for tokens in checked} == {8, 16, 32, 64, 128}


def test_simulate_checks():
    stdout, _ = succeeds(
        "benchmark.py", "moe", "--simulate", "--cases", "down-scout-64-random-int4"
    )
    assert "down-int4 padded 1 " in stdout and "down-int4 skewed 53 " in stdout
    assert "/s" not in stdout


@pytest.mark.parametrize("family", ["gated", "gated-fp8", "gradients", "move", "routed", "layer"])
def test_every_family_is_right(family):
    check = next(x for x in checks_of(family, TOY) if x.routing == "padded" and x.tokens > 1)
    assert outcome(check, "xla", errors).failure is None
    assert "raises ValueError" in outcome(check, "mosaic_gpu", errors).failure


@pytest.fixture
def traced_anew(monkeypatch):
    """Checks see what is patched."""
    run = checks._run.__wrapped__
    monkeypatch.setattr(
        checks, "_run", lambda part, way, a: jax.jit(lambda a: run(part, way, a))(a)
    )


def test_a_broken_kernel_fails_its_checks(traced_anew, command, monkeypatch, capsys):
    right = grouped_xla.product

    def forgets_scales(x, weights, group_of_block, row_scale, case, **options):
        return right(x, weights, group_of_block, None, case, **options)

    monkeypatch.setattr(grouped_xla, "product", forgets_scales)
    with pytest.raises(UserError, match=r"^gated random 1 is off, out by .*, and 5 more fail.$"):
        command("--simulate", "--cases", "gated-scout-1-random")
    assert "gated padded 53" in capsys.readouterr().out


def test_rows_that_go_astray_fail_their_checks(traced_anew, monkeypatch):
    right = Blocks.rows
    monkeypatch.setattr(
        Blocks, "rows", lambda way, plan, x: jnp.roll(right(way, plan, x), 1, axis=0)
    )
    check = checks_of("move", TOY)[-1]
    assert "move padded 53 is off, out by" in outcome(check, "xla", errors).failure


def test_mistakes_are_one_line(command):
    refuses("benchmark.py", "moe", words=["no GPU: ", "--simulate"])
    with pytest.raises(UserError, match=r"^--cases 'nothing' matches no case; --list names them.$"):
        command("--cases", "nothing")


@pytest.fixture
def figures(monkeypatch, tiny):
    """A run's, with the routings of one case."""
    monkeypatch.setattr(gpu, "KERNELS", "xla")
    ceilings, effort = {"TFLOP/s": 800.0, "TB/s": 4.0}, Effort(rounds=2, seconds=0.01)
    cases = [tiny("gated", routing=routing) for routing in ROUTINGS]
    return gpu.header(jax.devices()[0]) | {
        "checks": {"run": 430, "failures": []},
        "rounds": 2,
        "ceilings": ceilings,
        "left_out": ["layer-maverick-64k-random is left out."],
        "cases": [gpu.case_figures(SUITE, case, effort, ceilings) for case in cases],
    }


def test_figures_of_a_case(figures):
    case = json.loads(json.dumps(figures))["cases"][2]
    assert not case["errors"]
    assert case["routing"] == "skewed" and case["active_experts"] == 4
    assert case["longest_group"] == max(group_sizes("skewed", 24, 4))
    seconds = case["seconds"]["jaxmoe"]
    operations, weights = 2 * 24 * 2 * 128 * 64, 4 * 2 * 128 * 64 * 2
    assert case["work"] == {"TFLOP/s": operations, "TB/s": weights}
    assert case["rates"]["jaxmoe"]["TB/s"] == pytest.approx(weights / seconds / 1e12)
    assert case["of_ceiling"] == pytest.approx(weights / 4e12 / seconds)  # which is the nearer one
    assert all(case["seconds"][name] for name in ("xla", "ragged", "dense", "longest"))
    assert case["seconds"]["transformers"] is case["rates"]["transformers"] is None


def hand_made(name, routing, ms, longest, of_ceiling=0.765):
    seconds = {"jaxmoe": ms / 1e3, "xla": 0.1, "ragged": None, "dense": 4e-3, "transformers": None}
    return {
        "name": name,
        "routing": routing,
        "seconds": seconds | {"longest": longest and longest / 1e3},
        "rates": {"jaxmoe": {"TFLOP/s": 612.3, "TB/s": 0.1234}},
        "of_ceiling": of_ceiling,
        "errors": {"ragged": "XlaRuntimeError: RESOURCE_EXHAUSTED"},
    }


def test_tables_hold_the_figures(figures):
    figures["cases"] = [
        hand_made("gated-scout-8k-balanced", "balanced", 5, 0.5),
        hand_made("gated-scout-8k-random", "random", 5.5, 0.6),
        hand_made("gated-scout-8k-worst", "worst", 6, 5.9),
        hand_made("layer-scout-1-random", "random", 7, None),
    ]
    lines = write_tables.moe_markdown({"moe-h100.json": figures}).splitlines()
    row = "| gated-scout-8k-random | 5.5 | 612 | 0.123 | 0.77 | 100 | n/a | 4 | n/a |"
    assert row in lines
    assert not [line for line in lines if line.startswith("| gated-scout-8k-worst ")]
    assert "| gated-scout-8k | 5 (10.00) | 5.5 (9.17) | n/a | 6 (1.02) | 1.20 |" in lines
    assert not [line for line in lines if line.startswith("| layer-scout-1 ")]
    text = "\n".join(lines)
    assert "800 TFLOP/s and 4.00 TB/s" in text and "layer-maverick-64k-random is left out." in text
    assert "**" not in text
    figures["checks"]["failures"] = ["gated random is off"]
    assert "**1 failed**" in write_tables.moe_markdown({"moe-h100.json": figures})
    assert [tables.for_terminal(grid, "").row_count for grid in SUITE.grids(figures)] == [4, 1]
    assert tables.error_lines(figures, SUITE.contenders)[0] == (
        "gated-scout-8k-balanced, ragged_dot: XlaRuntimeError: RESOURCE_EXHAUSTED"
    )


def test_without_figures_the_document_says_so():
    text = write_tables.moe_markdown({})
    assert "nothing was measured" in text and "jaxmoe benchmark moe" in text


@pytest.mark.absent_gpu
@pytest.mark.parametrize("part", ["gated", "down", "dx", "dw"])
def test_only_the_part_is_timed(monkeypatch, part):
    """What a gradient does not need is left out; each set of tokens has its own product."""
    name = f"{part}-scout-{'1k' if part in ('dx', 'dw') else '1'}-random"
    (case,) = gpu.matching(all_cases(), [name])
    way = Blocks(16, "mosaic_gpu")
    hopper = dataclasses.make_dataclass("Target", ["is_hopper"])(True)
    monkeypatch.setattr("pallas_kernels.experts.group_metadata.target", lambda: hopper)
    monkeypatch.setattr(ways, "block_rows", lambda *_: 8 if case.tokens == 1 else 128)

    def sets():
        return [arguments(case, random_inputs(case), way, i) for i in range(case.sets)]

    monkeypatch.setattr(ways, "dispatch", lambda plan, x, **_: x[plan.item_of_row])
    run = calls._compiled.__wrapped__(part, way)
    text = lower_for(absent_h100s(1)[0], run, jax.eval_shape(sets)).as_text()
    (kernel,) = re.findall(r"func private @(\w+)\([^\n]*\n[^}]*custom_call @mosaic_gpu_v2", text)
    assert text.count(f"call @{kernel}(") == case.sets  # of one kernel
