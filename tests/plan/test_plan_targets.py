"""Targets are read by name and from files, and mistakes are reported in one sentence."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxmoe.errors import UserError
from jaxmoe.plan.targets import Target, absent_devices, known_names, parse_target

FIELDS = {
    "name": "pair",
    "devices": 2,
    "memory": "80e9",
    "bandwidth": 2e12,
    "flops": "300e12",
    "interconnect": 1e11,
}


@pytest.fixture
def file(tmp_path):
    def write(fields):
        path = tmp_path / "target.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
        return str(path)

    return write


@pytest.mark.parametrize("name", known_names())
def test_every_known_name(name):
    target = parse_target(name)
    assert target.name == name
    assert 0 < target.limit < target.memory


@pytest.mark.parametrize(
    "name, devices, compiler",
    [
        ("h100x3", 3, "h100"),
        ("b200x8", 8, "b200"),
        ("l40sx2", 2, "l40s"),
        ("v5p-16", 8, "v5p:2x2x2"),  # the name counts TensorCores, two per chip
        ("v6e-64", 64, "v6e:8x8"),
    ],
)
def test_devices(name, devices, compiler):
    target = parse_target(name)
    assert (target.devices, target.compiler) == (devices, compiler)


def test_a_file(file):
    want = Target(
        name="pair",
        devices=2,
        memory=80 * 10**9,
        bandwidth=2e12,
        flops=3e14,
        interconnect=1e11,
        reserve=0.1,
        launch=2e-6,
    )
    assert parse_target(file({**FIELDS, "reserve": 0.1, "launch": "2e-6"})) == want


def test_the_file_of_the_documentation(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "plan.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "target.yaml").write_text(block)
    assert parse_target(str(tmp_path / "target.yaml")).launch == 1.5e-6


@pytest.mark.parametrize(
    "change, words",
    [
        ({"memry": 1}, ["'memry'", "'memory'"]),
        ({"memory": "much"}, ["memory", "'much'"]),
        ({"devices": 0}, ["devices", "the value 0", "from 1 to"]),
        ({"devices": 2.5}, ["devices", "the value 2.5", "whole number"]),
        ({"reserve": 1}, ["reserve", "the value 1"]),
        ({"launch": -1e-6}, ["launch", "the value -1e-06"]),
        ({"memory": "9" * 5000}, ["5000 digits"]),
        ({"name": "[" * 5000}, ["nested"]),
        ({"flops": ".nan"}, ["flops", "nan"]),
    ],
)
def test_mistakes_in_a_file(file, change, words):
    path = file({**FIELDS, **change})
    with pytest.raises(UserError) as caught:
        parse_target(path)
    assert all(word in str(caught.value) for word in [path, *words])


def test_a_file_that_lacks_a_field(file):
    del (fields := dict(FIELDS))["flops"]
    with pytest.raises(UserError, match="lacks 'flops'"):
        parse_target(file(fields))


def test_one_gpu_needs_no_number():
    assert dataclasses.replace(parse_target("h100"), name="h100x1") == parse_target("h100x1")


@pytest.mark.parametrize("name", ["h100x", "h100x16", "h100x0", "v5p-24", "tpu", "nowhere.yaml"])
def test_an_unknown_target(name):
    with pytest.raises(UserError) as caught:
        parse_target(name)
    assert name in str(caught.value)
    if not name.endswith("yaml"):
        assert all(known in str(caught.value) for known in ("h200x8", "v5p-16", "v6e-64"))


def test_no_compiler(file):
    with pytest.raises(UserError, match="no compiler for pair: it serves a100, l40s, h100"):
        absent_devices(parse_target(file(FIELDS)))


@pytest.mark.absent_gpu
@pytest.mark.parametrize("name", [name for name in known_names() if name.endswith("x2")])
def test_gpus_that_are_not_there(name):
    target = parse_target(name)
    devices = absent_devices(target)
    assert len(devices) == target.devices
    assert all(name.partition("x")[0].upper() in device.device_kind for device in devices)
