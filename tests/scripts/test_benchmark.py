"""benchmark.py attention, as far as it goes without a GPU."""

import json

import _attention_cases
import _attention_checks
import _bench_attention
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from _attention_cases import Case, all_cases, matching, random_inputs, visible_pairs
from _attention_checks import TOY, Outcome, checks_of, outcome
from _bench import Call, Effort, time_in_turn

from pallas_kernels.attention import coords_of, reach, visible
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
    q = reach(coords_of(1, queries, start=keys - queries), causal=True, chunk=chunk)
    assert visible_pairs(queries, keys, chunk) == visible(q, coords_of(1, keys)).sum()


def test_work():
    """By hand: two products of 128 for each of 40 heads and each visible pair."""
    pairs = 8192 * 8193 / 2
    assert matching("prefill-8k")[0].work == 4 * 40 * 128 * pairs
    assert matching("backward-8k")[0].work == 2.5 * 4 * 40 * 128 * pairs
    assert matching("prefill-64k-chunked")[0].work == 8 * 4 * 40 * 128 * pairs
    eight_thousand = 2 * 8 * 8192  # keys and values of 8 heads
    assert matching("decode-8k-b8-bf16")[0].work == 8 * eight_thousand * 2 * 128
    assert matching("decode-8k-b8-int4")[0].work == 8 * eight_thousand * (64 + 4)


def test_caches_that_do_not_fit_are_left_out():
    h100 = 60 * 10**9
    left_out = {case.name: line for case in all_cases() if (line := case.left_out(h100))}
    assert set(left_out) == {
        f"decode-1m-b64-{format}" for format in ("bf16", "int8", "fp8", "int4")
    }
    assert "274.9 GB does not fit in the 60.0 GB" in left_out["decode-1m-b64-bf16"]


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8", "int4"])
def test_cached_arrays_are_as_large_as_counted(format, monkeypatch):
    monkeypatch.setattr(_attention_cases, "COLD_BYTES", 50e6)
    case = Case("small", "decode", 1, 16384, format=format)
    found = sum(x.nbytes for x in jax.tree.leaves(random_inputs(case).caches))
    assert found == case.sets * case.cache_bytes
    assert found >= 50e6


def test_a_wrong_result_fails_its_check(monkeypatch):
    right = _attention_checks._outputs

    def forgets_chunks(q, *args, chunk, **options):
        return right(q, *args, chunk=chunk if q.dtype == jnp.float32 else None, **options)

    check = checks_of("prefill-chunked", TOY)[0]
    assert outcome(check, "xla").failure is None
    assert "raises ValueError" in outcome(check, "mosaic_gpu").failure
    monkeypatch.setattr(_attention_checks, "_outputs", forgets_chunks)
    failure = outcome(check, "xla").failure
    assert "prefill-chunked plain is off" in failure and "out by " in failure


def test_errors_see_nan_and_infinities():
    def error(got, want):
        return Outcome("", {"out": _attention_checks._error(np.array(got), np.array(want))})

    assert error([1.0, -np.inf], [1.0, -np.inf]).failure is None
    assert error([1.0, 0.0], [1.0, -np.inf]).failure
    assert error([1.0, -np.inf], [1.0, 0.0]).failure
    assert error([1.0, np.nan], [1.0, 0.0]).failure


@pytest.fixture
def figures(monkeypatch):
    """A run's, with the one case that a CPU is fast enough for; cuDNN is not there."""
    monkeypatch.setattr(_bench_attention, "KERNELS", "xla")
    ceilings = {"TFLOP/s": 800.0, "TB/s": 4.0}
    case = Case("prefill-64-chunked", "prefill", 64, 64, chunk=16)
    found = _bench_attention._case_figures(case, Effort(rounds=2, seconds=0.01), ceilings)
    return _bench_attention._header(jax.devices()[0]) | {
        "checks": {"run": 67, "failures": []},
        "rounds": 2,
        "ceilings": ceilings,
        "left_out": ["decode-1m-b64-bf16 is left out."],
        "cases": [found],
    }


def test_figures_of_a_case(figures):
    case = json.loads(json.dumps(figures))["cases"][0]
    assert case["work"] == 4 * 40 * 128 * 4 * 136
    assert case["rates"]["jaxmoe"] == pytest.approx(case["work"] / case["seconds"]["jaxmoe"] / 1e12)
    assert case["of_ceiling"] == case["rates"]["jaxmoe"] / 800
    assert case["rates"]["cudnn"] is case["seconds"]["cudnn"] is None
    assert "cuDNN" in case["errors"]["cudnn"]


def test_tables_hold_the_figures(figures):
    figures["cases"][0] |= {
        "rates": {"jaxmoe": 612.3, "cudnn": 640.2, "xla": 0.234, "torch": None},
        "of_ceiling": 0.765,
        "errors": {"torch": "OutOfMemoryError: too much"},
    }
    row = ["prefill-64-chunked", "TFLOP/s", "612", "0.77", "640", "0.234", "n/a"]
    assert tables.attention_rows(figures) == [row]
    markdown = tables.attention_markdown({"attention-h200.json": figures})
    assert f"| {' | '.join(row)} |" in markdown.splitlines()
    assert "800 TFLOP/s and 4.00 TB/s" in markdown
    assert "decode-1m-b64-bf16 is left out." in markdown
    assert "**" not in markdown
    figures["checks"]["failures"] = ["prefill plain is off"]
    assert "**1 failed**" in tables.attention_markdown({"attention-h200.json": figures})
    assert _bench_attention.attention_table(figures).row_count == 1
    assert tables.attention_errors(figures) == [
        "prefill-64-chunked, torch: OutOfMemoryError: too much"
    ]


def test_without_figures_the_document_says_so():
    text = tables.attention_markdown({})
    assert "nothing was measured" in text and "scripts/benchmark.py attention" in text


def test_a_failing_contender_ends_nothing():
    def fails():
        raise RuntimeError("\n no kernel image\nfor this device")

    builders = {"first": fails, "second": lambda: Call(lambda: jnp.zeros(1))}
    seconds, errors = time_in_turn(builders, Effort(rounds=2, seconds=0.001))
    assert list(seconds) == ["second"]
    assert errors == {"first": "RuntimeError: no kernel image"}
