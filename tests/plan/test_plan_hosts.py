"""Plans for several hosts: links, latencies, and collectives as in steps compiled for them."""

import collections
import dataclasses
import math
import re

import numpy as np
import pytest

from jaxmoe.config import MAVERICK, SCOUT
from jaxmoe.errors import UserError
from jaxmoe.mesh import AXES, MeshConfig
from jaxmoe.plan import search
from jaxmoe.plan.collectives import collectives
from jaxmoe.plan.compiled import compile_lowered
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.links import Collective, crossing, groups_of, spread
from jaxmoe.plan.memory import memory
from jaxmoe.plan.steps import abstract_arguments, lower_step
from jaxmoe.plan.targets import Target, absent_devices, parse_target
from jaxmoe.plan.work import Work, capacity

TWO_HOSTS = parse_target("h100x8x2")
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
TWO_LAYERS = dataclasses.replace(MAVERICK, layers=MAVERICK.layers[2:4])  # dense and MoE


def found_in(hlo: str, mesh: MeshConfig) -> collections.Counter:
    """How many collectives a program has of each kind, groups and bytes of a whole array."""
    found: collections.Counter = collections.Counter()
    pattern = rf"= (.*?) ({KINDS})(-start)?\(.*?replica_groups=(mesh\[.*?\] {{.*?}}|\S+?), "
    for types, kind, start, groups in re.findall(pattern, hlo):
        sizes = [array_bytes(*x) for x in re.findall(r"([a-z]+)(\d+)\[([\d,]*)\]", types)]
        members = groups_in(groups, mesh)
        half = len(sizes) // 2 if start else 0  # operands come first
        nbytes = max(sum(sizes[:half]), sum(sizes[half:]))
        if kind == "reduce-scatter" and not start:
            nbytes *= members.shape[1]
        found[kind, members.tobytes(), nbytes] += 1
    return found


def array_bytes(_, bits, shape):
    return int(bits) // 8 * math.prod(int(n) for n in shape.split(",") if n)


def groups_in(text: str, mesh: MeshConfig) -> np.ndarray:
    """The groups of devices that HLO names by mesh axes, or by a transposed range."""
    if text.startswith("mesh"):
        return groups_of(mesh, tuple(re.findall(r"'(\w+)'", text.partition("{")[2])))
    shape, dims, order = re.fullmatch(
        r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ).groups()
    ids = np.arange(math.prod(map(int, dims.split(",")))).reshape([*map(int, dims.split(","))])
    ids = ids.transpose([*map(int, order.split(","))]) if order else ids
    return ids.reshape([*map(int, shape.split(","))])


@pytest.mark.absent_gpu
@pytest.mark.parametrize(
    ("mesh", "rows"),
    [("expert=2,tensor=8", 16), ("expert=2,sequence=2,tensor=4", 1)],
    ids=["many rows", "fused kernels"],
)
def test_bytes_and_collectives_are_those_of_the_compiler(mesh, rows):
    """Two layers of Maverick in bf16 for two hosts: the same sums over the same devices."""
    work = Work(config=TWO_LAYERS, context=8192, rows=rows)
    mesh = MeshConfig.parse(mesh)
    devices = mesh.make(absent_devices(TWO_HOSTS))
    assert [d.process_index for d in devices.devices.flat] == 8 * [0] + 8 * [1]
    room = capacity(work, mesh)
    arguments = abstract_arguments(work.config, devices, rows=rows, tokens=1, capacity=room)
    compiled = compile_lowered(lower_step(work.config, devices, arguments), TWO_HOSTS)
    formula, analysis = memory(work, mesh), compiled.memory_analysis()
    assert formula.weights == device_bytes(arguments[0])
    assert formula.cache == device_bytes(arguments[-1])
    peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    assert formula.peak == pytest.approx(peak, rel=0.05)
    planned: collections.Counter = collections.Counter()
    for x in collectives(work, mesh, TWO_HOSTS):
        planned[x.kind, groups_of(mesh, x.axes).tobytes(), x.nbytes] += x.count
    assert found_in(compiled.as_text(), mesh) == planned
    assert any(spread(mesh, x.axes, 8)[1] == 2 for x in collectives(work, mesh, TWO_HOSTS))


def test_groups_are_those_of_jax():
    mesh = MeshConfig.parse("data=2,expert=2,tensor=2")
    ids = np.vectorize(lambda device: device.id)(mesh.make().devices)
    for axes in (("tensor",), ("expert",), ("data", "tensor")):
        inner = [AXES.index(axis) for axis in axes]
        moved = np.moveaxis(ids, inner, range(-len(inner), 0))
        assert (groups_of(mesh, axes) == moved.reshape(groups_of(mesh, axes).shape)).all()


@pytest.mark.parametrize(
    ("mesh", "axes", "wanted"),
    [
        ("expert=2,tensor=8", ("tensor",), (8, 1)),
        ("expert=2,tensor=8", ("expert",), (2, 2)),
        ("expert=2,tensor=8", ("expert", "tensor"), (16, 2)),
        ("fsdp=16", ("fsdp",), (16, 2)),
        ("data=4,tensor=4", ("data",), (4, 2)),
        ("sequence=16", ("tensor",), (1, 1)),
    ],
)
def test_hosts_of_a_collective(mesh, axes, wanted):
    assert spread(MeshConfig.parse(mesh), axes, 8) == wanted


def test_what_crosses_hosts():
    assert crossing(MeshConfig.parse("data=2,expert=2,tensor=4"), 8) == ["data"]
    assert crossing(MeshConfig.parse("data=2,expert=4,tensor=2"), 8) == ["data"]
    assert crossing(MeshConfig.parse("expert=4,tensor=4"), 8) == ["expert"]


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        ("all-reduce", 2 * 7 / 8, 2 * 1 / 2 / 8),  # each device sums an eighth with the other host
        ("all-gather", 7 / 8, 1 / 2 / 8),
        ("reduce-scatter", 7 / 8, 1 / 2 / 8),
        ("all-to-all", 7 / 16, 8 / 16),
    ],
)
def test_bytes_by_link(kind, inside, outside):
    mesh, one = MeshConfig(fsdp=16), Collective(kind, ("fsdp",), 1600, 3)
    assert one.sent(mesh, 8) == pytest.approx((3 * 1600 * inside, 3 * 1600 * outside))
    whole = 2 * 15 / 16 if kind == "all-reduce" else 15 / 16
    assert one.sent(mesh) == pytest.approx((3 * 1600 * whole, 0))
    slow = one.seconds(mesh, dataclasses.replace(TWO_HOSTS, between_hosts=1.0))
    assert slow == pytest.approx(3 * 1600 * outside)


def test_latency_grows_with_hosts():
    one = Collective("all-reduce", ("data",), 2)
    seconds = [one.latency(MeshConfig(data=8 * n), parse_target(f"h100x8x{n}")) for n in (2, 8, 64)]
    assert seconds == pytest.approx([20e-6, 40e-6, 70e-6])
    assert one.latency(MeshConfig(data=8), parse_target("h100x8")) == pytest.approx(10e-6)


@pytest.mark.parametrize("rows", [1, 16])
def test_the_best_mesh_keeps_tensor_within_a_host(rows):
    """Sums of each layer over two hosts take longer, by latency with few tokens."""
    best, reason = search.best(Work(config=MAVERICK, rows=rows), TWO_HOSTS)
    assert str(best.mesh) == "expert=2,tensor=8"
    assert "estimate" in reason


def test_a_slow_network_is_avoided():
    """Data crosses hosts where parameters would, and the rank says so."""
    work = Work(config=SCOUT, weights="int4", rows=64, context=1024, task="prefill")
    slow = dataclasses.replace(TWO_HOSTS, between_hosts=1e6)
    assert crossing(search.best(work, slow)[0].mesh, 8) == ["data"]


def test_hosts_of_targets():
    target = parse_target("h200x8x64")
    assert (target.devices, target.hosts, target.devices_a_host) == (512, 64, 8)
    assert target.between == 50e9 < target.interconnect
    assert parse_target("h100x4x2").devices_a_host == 4
    for name in ("h100x8x65", "h100x8x0", "h100x9x2", "l40sx8x2", "h100x8x2x2"):
        with pytest.raises(UserError, match="unknown"):
            parse_target(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"hosts": 3}, "8 devices on 3 hosts"), ({"hosts": 2}, "add 'between_hosts'")],
)
def test_hosts_that_cannot_be(changes, words):
    fields = {"name": "x", "devices": 8, "memory": 1, "bandwidth": 1.0, "flops": 1.0}
    with pytest.raises(UserError, match=words):
        Target(**fields, interconnect=1.0, **changes)
