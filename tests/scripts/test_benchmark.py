"""benchmark.py attention, and what it shares with others, as far as they go without a GPU."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import write_tables
from jaxmoe.benchmarks import gpu, tables
from jaxmoe.benchmarks.attention import cases, checks
from jaxmoe.benchmarks.attention.cases import Case, all_cases, random_inputs, visible_pairs
from jaxmoe.benchmarks.attention.checks import TOY, checks_of, errors
from jaxmoe.benchmarks.attention.suite import SUITE
from jaxmoe.benchmarks.checks import Outcome, largest_error, outcome
from jaxmoe.benchmarks.timing import Call, Effort, time_in_turn
from jaxmoe.errors import UserError
from pallas_kernels.attention import coords_of, make_mask, visible
from tests.scripts import refuses, succeeds


def test_list_names_the_cases():
    names = succeeds("benchmark.py", "attention", "--list", "--cases", "decode-1m-*-int4")[0]
    assert names.split() == ["decode-1m-b1-int4", "decode-1m-b8-int4", "decode-1m-b64-int4"]


def test_names_and_families_are_one_to_one():
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.family for case in cases} == {
        *("prefill", "prefill-chunked", "prefill-segment", "backward", "backward-chunked"),
        *("decode-bf16", "decode-int8", "decode-fp8", "decode-int4"),
    }


@pytest.mark.parametrize(
    "pattern, checks",
    [
        ("[pb]*-32k-chunked", ["prefill-chunked packed", "backward-chunked packed"]),
        ("decode-8k-b1-int*", ["decode-int8 turned, chunked", "decode-int4 turned, full"]),
    ],
)
def test_simulate_checks(pattern, checks):
    stdout, _ = succeeds("benchmark.py", "attention", "--simulate", "--cases", pattern)
    assert all(check in stdout for check in checks)
    assert "/s" not in stdout


def test_mistakes_are_one_line():
    refuses("benchmark.py", "attention", words=["no GPU: ", "--simulate"])
    refuses("benchmark.py", "attention", "--cases", "nothing", words=["'nothing'", "--list"])


@pytest.mark.parametrize("chunk", [None, 1, 5, 16, 40])
@pytest.mark.parametrize("queries, keys", [(1, 1), (40, 40), (48, 48), (7, 40), (1, 33)])
def test_pairs_are_those_of_the_rule(queries, keys, chunk):
    q = make_mask(chunk=chunk).key_range(coords_of(1, queries, start=keys - queries))
    assert visible_pairs(queries, keys, chunk) == visible(q, coords_of(1, keys)).sum()


def work(name):
    (case,) = gpu.matching(all_cases(), [name])
    return case.work


def test_work():
    """By hand: two products of 128 for each of 40 heads and each visible pair."""
    pairs = 8192 * 8193 / 2
    assert work("prefill-8k") == {"TFLOP/s": 4 * 40 * 128 * pairs}
    assert work("backward-8k") == {"TFLOP/s": 2.5 * 4 * 40 * 128 * pairs}
    assert work("prefill-64k-chunked") == {"TFLOP/s": 8 * 4 * 40 * 128 * pairs}
    eight_thousand = 2 * 8 * 8192  # keys and values of 8 heads
    assert work("decode-8k-b8-bf16") == {"TB/s": 8 * eight_thousand * 2 * 128}
    assert work("decode-8k-b8-int4") == {"TB/s": 8 * eight_thousand * (64 + 4)}


def test_caches_that_do_not_fit_are_left_out():
    h100 = 60 * 10**9
    left_out = {case.name: line for case in all_cases() if (line := case.left_out(h100))}
    assert set(left_out) == {
        f"decode-1m-b64-{format}" for format in ("bf16", "int8", "fp8", "int4")
    }
    assert "274.9 GB does not fit in the 60.0 GB" in left_out["decode-1m-b64-bf16"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["bf16", "int8", "fp8", "int4"])
def test_cached_arrays_are_as_large_as_counted(format, monkeypatch):
    monkeypatch.setattr(cases, "COLD_BYTES", 50e6)
    case = Case("small", "decode", 1, 16384, format=format)
    found = sum(x.nbytes for x in jax.tree.leaves(random_inputs(case).caches))
    assert found == case.sets * case.cache_bytes
    assert found >= 50e6


def test_a_wrong_result_fails_its_check(monkeypatch):
    right = checks._outputs

    def forgets_chunks(q, *args, chunk, **options):
        return right(q, *args, chunk=chunk if q.dtype == jnp.float32 else None, **options)

    check = checks_of("prefill-chunked", TOY)[0]
    assert outcome(check, "xla", errors).failure is None
    assert "raises ValueError" in outcome(check, "mosaic_gpu", errors).failure
    monkeypatch.setattr(checks, "_outputs", forgets_chunks)
    failure = outcome(check, "xla", errors).failure
    assert "prefill-chunked plain is off" in failure and "out by " in failure


def test_errors_see_nan_and_infinities():
    def error(got, want):
        return Outcome("", {"out": largest_error(np.array(got), np.array(want))})

    assert error([1.0, -np.inf], [1.0, -np.inf]).failure is None
    assert error([1.0, 0.0], [1.0, -np.inf]).failure
    assert error([1.0, -np.inf], [1.0, 0.0]).failure
    assert error([1.0, np.nan], [1.0, 0.0]).failure


@pytest.fixture
def figures(monkeypatch):
    """A run's, with the one case that a CPU is fast enough for; cuDNN is not there."""
    monkeypatch.setattr(gpu, "KERNELS", "xla")
    ceilings = {"TFLOP/s": 800.0, "TB/s": 4.0}
    case = Case("prefill-64-chunked", "prefill", 64, 64, chunk=16)
    found = gpu.case_figures(SUITE, case, Effort(rounds=2, seconds=0.01), ceilings)
    return gpu.header(jax.devices()[0]) | {
        "checks": {"run": 67, "failures": []},
        "rounds": 2,
        "ceilings": ceilings,
        "left_out": ["decode-1m-b64-bf16 is left out."],
        "cases": [found],
    }


def test_figures_of_a_case(figures):
    case = json.loads(json.dumps(figures))["cases"][0]
    assert case["work"] == {"TFLOP/s": 4 * 40 * 128 * 4 * 136}
    rate = case["work"]["TFLOP/s"] / case["seconds"]["jaxmoe"] / 1e12
    assert case["rates"]["jaxmoe"] == {"TFLOP/s": pytest.approx(rate)}
    assert case["of_ceiling"] == pytest.approx(rate / 800)
    assert case["rates"]["cudnn"] is case["seconds"]["cudnn"] is None
    assert "cuDNN" in case["errors"]["cudnn"]


def test_tables_hold_the_figures(figures):
    rates = {"jaxmoe": 612.3, "cudnn": 640.2, "xla": 0.234}
    figures["cases"][0] |= {
        "rates": {name: {"TFLOP/s": rate} for name, rate in rates.items()} | {"torch": None},
        "of_ceiling": 0.765,
        "errors": {"torch": "OutOfMemoryError: too much"},
    }
    row = ["prefill-64-chunked", "TFLOP/s", "612", "0.77", "640", "0.234", "n/a"]
    assert tables.attention_grid(figures).rows == [row]
    markdown = write_tables.attention_markdown({"attention-h200.json": figures})
    assert f"| {' | '.join(row)} |" in markdown.splitlines()
    assert "800 TFLOP/s and 4.00 TB/s" in markdown
    assert "decode-1m-b64-bf16 is left out." in markdown
    assert "**" not in markdown
    figures["checks"]["failures"] = ["prefill plain is off"]
    assert "**1 failed**" in write_tables.attention_markdown({"attention-h200.json": figures})
    assert tables.for_terminal(tables.attention_grid(figures), "").row_count == 1
    assert tables.error_lines(figures, tables.ATTENTION_CONTENDERS) == [
        "prefill-64-chunked, torch: OutOfMemoryError: too much"
    ]


def test_without_figures_the_document_says_so():
    text = write_tables.attention_markdown({})
    assert "nothing was measured" in text and "jaxmoe benchmark attention" in text


def test_a_failing_contender_ends_nothing():
    def fails():
        raise RuntimeError("\n no kernel image\nfor this device")

    builders = {"first": fails, "second": lambda: Call(lambda: jnp.zeros(1))}
    seconds, errors = time_in_turn(builders, Effort(rounds=2, seconds=0.001))
    assert list(seconds) == ["second"]
    assert errors == {"first": "RuntimeError: no kernel image"}


@pytest.fixture
def device(monkeypatch, untyped):
    """Stands in for a GPU, on which nothing is checked and the ceilings are known."""
    monkeypatch.setattr(gpu, "_ceilings", lambda effort: {"TFLOP/s": 800.0, "TB/s": 4.0})
    monkeypatch.setattr(gpu, "header", lambda device: {"device": "stand-in"})
    return dataclasses.make_dataclass("Device", ["memory_stats"])(
        lambda: {"bytes_limit": 4 * 10**9}
    )


def measure(suite, device, path, **options):
    args = {
        "output": str(path),
        "force": False,
        "check_only": False,
        "time_only": False,
        "quick": True,
    } | options
    gpu.measure(suite, argparse.Namespace(**args), suite.cases(), device)


def short_suite(builders, checks=()):
    """Two small cases without arrays, and one that is too large."""
    cases = [Case(name, "prefill", 2, 2) for name in ("first", "second")]
    cases.append(Case("large", "decode", 1, 2**22))
    made = {"cases": lambda: cases, "inputs": lambda case: None}
    made["checks"] = lambda family, size: checks if family == "prefill" else []
    return dataclasses.replace(SUITE, **made, builders=builders)


def test_a_run_that_is_cut_off_leaves_its_figures(device, tmp_path):
    def builders(case, inputs, implementation):
        if case.name == "second":
            raise KeyboardInterrupt
        return {"jaxmoe": lambda: Call(lambda: jnp.zeros(1))}

    with pytest.raises(KeyboardInterrupt):
        measure(short_suite(builders), device, tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [case["name"] for case in figures["cases"]] == ["first"]
    assert figures["ceilings"]["TB/s"] == 4.0
    assert figures["left_out"][0].startswith("large is left out")


def test_a_case_without_room_for_its_arrays_ends_nothing(device, tmp_path):
    def builders(case, inputs, implementation):
        if case.name == "first":
            raise MemoryError("no room")
        return {"jaxmoe": lambda: Call(lambda: jnp.zeros(1))}

    measure(short_suite(builders), device, tmp_path / "figures.json")
    first, second = json.loads((tmp_path / "figures.json").read_text())["cases"]
    assert first["errors"] == dict.fromkeys(SUITE.contenders, "MemoryError: no room")
    assert first["seconds"]["jaxmoe"] is None and second["seconds"]["jaxmoe"] > 0


def test_nothing_is_timed_after_a_failure(device, tmp_path):
    check = checks_of("prefill", TOY)[0]  # by kernels for a GPU, which is not there
    suite = short_suite(lambda *_: {}, checks=[check, check])
    path = tmp_path / "figures.json"
    with pytest.raises(UserError, match=r"raises ValueError: .*, and 1 more fail; --force"):
        measure(suite, device, path)
    assert len(json.loads(path.read_text())["checks"]["failures"]) == 2
    measure(suite, device, path, force=True)
    assert len(json.loads(path.read_text())["cases"]) == 2


def test_only_runs_that_timed_something_have_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(write_tables, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for name, figures in {"a": {"checks": {}}, "b": {"cases": []}, "c": {"cases": [1]}}.items():
        (tmp_path / "benchmarks" / f"moe-{name}.json").write_text(json.dumps(figures))
    assert write_tables._measured("moe") == {"moe-c.json": {"cases": [1]}}
    assert write_tables._measured("attention") == {}
