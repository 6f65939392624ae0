"""The cases of benchmark.py moe: their sizes, their routings and the work in them."""

import numpy as np
import pytest

from jaxmoe.benchmarks import gpu
from jaxmoe.benchmarks.moe.cases import all_cases
from jaxmoe.benchmarks.moe.routing import experts_of, group_sizes
from jaxmoe.benchmarks.tables import ROUTINGS

D, F = 5120, 8192


def named(name):
    (case,) = gpu.matching(all_cases(), [name])
    return case


def test_cases_are_complete():
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    found = {(case.part, case.model, case.tokens, case.routing) for case in cases}
    sizes = {1: ("random",), **dict.fromkeys((64, 1024, 8192, 65536), ROUTINGS)}
    assert found == {
        (part, model, tokens, routing)
        for part in ("gated", "down", "dx", "dw", "move", "routed", "layer")
        for model in ("scout", "maverick")
        for tokens, routings in sizes.items()
        for routing in routings
        if tokens > 64 or part not in ("dx", "dw")
    }
    quantized = {(case.part, case.tokens, case.format) for case in cases if case.format != "bf16"}
    assert quantized == {
        (part, tokens, format)
        for part in ("gated", "down", "routed")
        for tokens in (1, 64)
        for format in ("int8", "fp8", "int4")
    }


@pytest.mark.parametrize("experts", [16, 128])
@pytest.mark.parametrize("tokens", [1, 64, 1024, 8192])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, tokens, experts):
    found = experts_of(routing, tokens, experts)
    sizes = np.bincount(found, minlength=experts)
    assert len(found) == sizes.sum() == tokens
    assert len(sizes) == experts
    assert np.array_equal(found, experts_of.__wrapped__(routing, tokens, experts))
    if routing == "balanced":
        assert sizes.max() - sizes.min() <= 1
    if routing == "worst":
        assert sizes.max() == tokens


def test_popularity_falls_as_one_over_the_rank():
    sizes = group_sizes("skewed", 10000, 16)
    exact = 10000 / np.arange(1, 17) / np.sum(1 / np.arange(1, 17))
    assert np.all(np.abs(sizes - exact) < 1)
    found = np.bincount(experts_of("skewed", 10000, 16))
    assert sorted(found, reverse=True) == list(sizes) != list(found)


def test_tokens_come_in_mixed_order():
    assert 1000 < np.count_nonzero(np.diff(experts_of("balanced", 8192, 2))) < 5000


def test_work():
    """By hand: products of 5120 x 8192 for each token, of two matrices or more."""
    product = 2 * D * F
    all_of_scout = 16 * D * F * 2  # bytes of one matrix of each expert
    assert named("gated-scout-8k-random").work == {
        "TFLOP/s": 8192 * 2 * product, "TB/s": 2 * all_of_scout
    }  # fmt: skip
    one = {"TFLOP/s": 1024 * product, "TB/s": D * F * 2}
    assert named("down-scout-1k-worst").work == named("dx-scout-1k-worst").work == one
    assert named("dw-scout-1k-worst").work == one | {"TB/s": all_of_scout}
    assert named("routed-maverick-64k-balanced").work == {
        "TFLOP/s": 65536 * 3 * product, "TB/s": 8 * 3 * all_of_scout
    }  # fmt: skip
    assert named("layer-scout-8k-balanced").work == {
        "TFLOP/s": 8192 * (6 * product + 2 * D * 16),
        "TB/s": 3 * all_of_scout + 3 * D * F * 2 + D * 16 * 2,
    }
    there_and_back = 2 * 2 * 1024 * D * 2  # each read and written
    assert named("move-maverick-1k-skewed").work == {"TB/s": there_and_back}
    assert named("routed-maverick-64-balanced").work["TB/s"] == 64 * 3 * D * F * 2
    scales = F + F + D
    one_in_int8 = 3 * D * F + 4 * scales
    assert named("routed-maverick-1-random-int8").work["TB/s"] == one_in_int8


def test_cases_that_do_not_fit_are_left_out():
    h100, small = 60 * 10**9, 30 * 10**9
    assert not [case.name for case in all_cases() if case.left_out(h100)]
    left_out = {case.name: line for case in all_cases() if (line := case.left_out(small))}
    assert {case.partition("-")[0] for case in left_out} == {"routed", "layer"}
    assert "32.2 GB of weights and tokens do not fit in the 30.0 GB" in left_out[
        "routed-maverick-64-random"
    ]  # fmt: skip


def test_few_tokens_go_to_other_experts_in_turn():
    """So that no matrix is served from a cache of 50 MB."""
    for case in all_cases():
        if case.tokens <= 64 and case.part != "move":
            assert case.sets * case.weight_bytes >= 250e6 and case.sets * case.active <= 128
    (x, y) = (set(named("gated-scout-1-random").experts + i) for i in range(2))
    assert named("gated-scout-1-random").sets == 2 and not x & y
