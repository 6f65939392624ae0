"""The chosen mesh is the best of all meshes, and a step's demand equals counts made by hand."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import pytest

from jaxmoe.config import MAVERICK, PRESETS, SCOUT, layer_kinds
from jaxmoe.errors import UserError
from jaxmoe.mesh import AXES, MeshConfig
from jaxmoe.model.kv_cache import abstract_cache, round_capacity
from jaxmoe.model.params import abstract_params
from jaxmoe.plan import planner, search
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.speed import bounds, demand
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.work import Work, abstract_mesh


def all_meshes(devices):
    sizes = itertools.product(range(1, devices + 1), repeat=len(AXES))
    return [MeshConfig(**dict(zip(AXES, s, strict=True))) for s in sizes if math.prod(s) == devices]


def full_bytes(work, mesh):
    """Bytes of weights and cache from the whole model's arrays; None if it is not divided."""
    abstract = abstract_mesh(mesh)
    try:
        params = abstract_params(work.config, abstract, jnp.bfloat16, work.format)
    except UserError:
        return None
    slots = round_capacity(work.context, abstract)
    cache = abstract_cache(work.config, work.rows, slots, work.kv_dtype, abstract)
    return device_bytes((params, cache))


@pytest.mark.parametrize("devices", [1, 6, 8])
def test_meshes_are_all_there_are(devices):
    found = list(search.meshes(devices))
    assert len(found) == len(set(found))
    assert set(found) == set(all_meshes(devices))


@pytest.mark.parametrize("rows", [1, 4])
def test_the_best_mesh_by_brute_force(rows):
    """If no mesh fits, the chosen one needs the fewest bytes by independently computed arrays."""
    target = dataclasses.replace(parse_target("h100x8"), memory=10**9)
    config = dataclasses.replace(SCOUT, layers=layer_kinds(4))
    work = Work(config=config, context=1_000_000, rows=rows)
    nbytes = {mesh: full_bytes(work, mesh) for mesh in all_meshes(8)}
    dividing = {mesh: found for mesh, found in nbytes.items() if found is not None}
    best, reason = search.best(work, target)
    assert len(search.candidates(work, target)) == len(dividing)
    assert "none of" in reason
    assert dividing[best.mesh] <= 1.01 * min(dividing.values())


@pytest.mark.parametrize("task", ["decode", "prefill", "train"])
@pytest.mark.parametrize("name", PRESETS)
def test_no_mesh_that_fits_is_faster(name, task):
    target = dataclasses.replace(parse_target("v5p-32"), memory=10**12)
    work = Work(config=PRESETS[name], task=task, context=65536, rows=16)
    best, reason = search.best(work, target)
    fitting = [each for each in search.candidates(work, target) if each.fits(target)]
    assert best.fits(target)
    assert best.bounds.seconds == min(each.bounds.seconds for each in fitting)
    assert f"{len(fitting)} fit" in reason


def test_the_longest_context_is_that_of_the_best_mesh():
    target = parse_target("h100x2")
    start = Work(config=SCOUT, weights="int4", kv="int4")
    work = planner.with_longest_context(start, target, None)
    contexts = [search.largest_context(work, mesh, target) for mesh in all_meshes(2)]
    assert work.context == max(contexts) > min(contexts)
    assert search.best(work, target)[0].fits(target)


def test_decode_reads_one_expert_a_token():
    """Scout reads one of 16 experts of each layer, and no embedding table, on one device."""
    D, F, V = 5120, 8192, 202048
    experts, table = 48 * 16 * 3 * D * F, V * D
    active = (107_769_861_120 - table - experts) + experts / 16
    found = demand(Work(config=SCOUT, context=1), MeshConfig())
    assert found.weights == pytest.approx(2 * (active + D), rel=1e-9)
    norms = (2 * 48 + 1) * D
    assert found.flops == pytest.approx(2 * (active - norms), rel=1e-3)
    assert found.sent() == (0, 0)


def test_many_rows_read_all_experts():
    few, many = (
        demand(Work(config=MAVERICK, context=1, rows=rows), MeshConfig(expert=8)).weights
        for rows in (1, 8192)
    )
    stored = 2 * 400_711_848_960
    assert few < 0.1 * stored
    assert many == pytest.approx(
        full_bytes(Work(config=MAVERICK, context=1), MeshConfig(expert=8)) - 2 * 202048 * 5120,
        rel=0.02,
    )


def test_prefill_attends_to_all_that_is_cached():
    """At a long context, the last prefill chunk's attention to earlier tokens dominates."""
    work = Work(config=SCOUT, task="prefill", context=10_000_000)
    pairs = 12 * 8192 * 10_000_000
    assert demand(work, MeshConfig()).flops == pytest.approx(4 * 40 * 128 * pairs, rel=0.05)
    for mesh in (MeshConfig(tensor=8), MeshConfig(sequence=8)):
        whole, part = demand(work, MeshConfig()).flops, demand(work, mesh).flops
        assert part == pytest.approx(whole / 8, rel=0.01)


def test_a_ring_sends_its_array_twice():
    """For one token on tensor=8: attention and feed-forward in float32, experts in bfloat16."""
    found = demand(Work(config=SCOUT, context=1), MeshConfig(tensor=8))
    assert found.sent()[0] == pytest.approx(2 * 7 / 8 * 5120 * (48 * (4 + 4 + 2) + 2))


@pytest.mark.parametrize("segment, layers", [(8 * 8192, 12), (8 * 4096, 48)])
def test_devices_with_whole_chunks_send_no_keys_of_local_layers(segment, layers):
    """A device sends keys and values in `layers` layers, queries and results in 12 global ones."""
    work = Work(config=SCOUT, task="prefill", context=10 * 8 * 8192, prefill_chunk=segment)
    numbers = layers * 8 * (2 + 2) + 12 * 40 * (2 + 4)
    sent, _ = demand(work, MeshConfig(sequence=8)).sent()
    assert sent == pytest.approx(7 / 8 * segment * 128 * numbers)


def test_what_binds():
    target = parse_target("h100x8")
    decode = bounds(target, demand(Work(config=SCOUT, context=10_000_000), MeshConfig(tensor=8)))
    prefill = Work(config=SCOUT, task="prefill", context=10_000_000)
    assert decode.binds == "memory"
    assert bounds(target, demand(prefill, MeshConfig(tensor=8))).binds == "compute"


def test_what_does_not_fit_names_what_does():
    target = parse_target("h100x8")
    work = Work(config=MAVERICK, context=8192)
    plan = planner.make_plan("maverick", work, target, None)
    with pytest.raises(UserError, match=r"holds it\.$") as caught:
        planner.check_fits(plan)
    found = search.nearest(work, target)
    assert found is not None
    other, mesh = found
    assert f"--target {other.name} --mesh {mesh}" in str(caught.value)
    assert search.candidate(work, mesh, other).fits(other)


def test_another_mesh_of_the_same_target_is_nearest():
    target = parse_target("h100x8")
    plan = planner.make_plan(
        "scout", Work(config=SCOUT, context=100_000), target, MeshConfig(sequence=8)
    )
    with pytest.raises(UserError, match="--target h100x8 --mesh tensor=8 holds it"):
        planner.check_fits(plan)
