"""What tune.py drops, chooses and writes."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.benchmarks.tuning_problems import Problem, all_problems
from jaxmoe.cli import tune
from jaxmoe.errors import UserError
from pallas_kernels.attention import coords_of
from pallas_kernels.attention.mosaic_backward import BackwardConfig
from pallas_kernels.attention.mosaic_forward import ForwardConfig
from pallas_kernels.compile.absent import absent_h100s
from pallas_kernels.quantized import Quantized

SMALL, LARGE, LARGEST = ForwardConfig(64), ForwardConfig(128), ForwardConfig(256)
HEAD = {"head_dim": 64}


def times_config(config, q_coords, k_coords, x):
    return x * config.block_k


def coords():
    return coords_of(1, 8), coords_of(1, 8)


@pytest.fixture
def problem():
    shapes = (jax.ShapeDtypeStruct((8,), jnp.float32),)
    return Problem("flash_forward", HEAD, [LARGE, SMALL, LARGEST], times_config, coords, shapes)


@pytest.fixture
def compiled(monkeypatch):
    """Registers by config, for a compiler that fails with all others."""

    def stand_in(registers):
        def of(device, problem, config):
            if config not in registers:
                raise UserError("it spills")
            return registers[config]

        monkeypatch.setattr(tune, "_registers", of)

    return stand_in


def entry(problem):
    (found,) = tune.tuned(jax.devices()[0], [problem])["entries"]
    return found


def test_first_that_compiles(monkeypatch, compiled, problem):
    compiled({SMALL: 100, LARGEST: 200})
    monkeypatch.setattr(tune, "_seconds", lambda *_: {})
    assert entry(problem) == {
        "op": "flash_forward",
        "key": HEAD,
        "config": {"block_k": 64, "slots": 2},
        "registers": 100,
        "chosen_by": "compiler",
        "ms": None,
        "dropped": [{"config": {"block_k": 128, "slots": 2}, "reason": "it spills"}],
    }


def test_fastest_where_there_is_a_device(monkeypatch, compiled, problem):
    compiled({LARGE: 168, SMALL: 100, LARGEST: 200})
    monkeypatch.setattr(tune, "_seconds", lambda *_: {LARGE: 3e-3, SMALL: 1e-3, LARGEST: 2e-3})
    found = entry(problem)
    assert found["config"] == dataclasses.asdict(SMALL)
    assert (found["registers"], found["chosen_by"], found["ms"]) == (100, "time", 1.0)


def test_nothing_compiles(compiled, problem):
    compiled({})
    with pytest.raises(
        UserError, match=r"no config of flash_forward .* compiles, the first for: it spills"
    ):
        entry(problem)


def test_only_present_devices_are_timed(problem, untyped):
    (here,) = jax.devices()[:1]
    assert tune._seconds(here, problem, [SMALL, LARGE]).keys() == {SMALL, LARGE}
    absent = dataclasses.make_dataclass("Device", ["device_kind"])("NVIDIA H200")
    assert tune._seconds(absent, problem, [SMALL, LARGE]) == {}


@pytest.mark.parametrize("format, dtype", [("int8", jnp.int8), ("fp8", jnp.float8_e4m3fn)])
def test_random_arguments(format, dtype):
    shapes = (
        jax.ShapeDtypeStruct((2, 64), jnp.bfloat16),
        Quantized(
            jax.ShapeDtypeStruct((2, 64), dtype), jax.ShapeDtypeStruct((2,), jnp.float32), format
        ),
    )
    arrays = tune._random(shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), arrays) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    assert all(len(set(x.ravel().tolist())) > 1 for x in jax.tree.leaves(arrays))


def test_each_config_is_tried_once():
    for problem in all_problems():
        assert len(set(problem.candidates)) == len(problem.candidates) > 2


@pytest.mark.absent_gpu
def test_what_the_compiler_refuses_is_dropped(monkeypatch, tmp_path):
    problem = next(
        p for p in all_problems() if (p.op, p.key) == ("flash_backward", {"head_dim": 128})
    )
    good, spilling = BackwardConfig(), BackwardConfig(block_q=128)
    too_large = BackwardConfig(dkv_slots=16)
    problem = dataclasses.replace(problem, candidates=[too_large, spilling, good])
    monkeypatch.setattr(tune, "all_problems", lambda: [problem])
    monkeypatch.setattr(sys, "argv", ["tune.py", "--output", str(tmp_path / "file.json")])
    tune.main()
    figures = json.loads((tmp_path / "file.json").read_text())
    (found,) = figures["entries"]
    reasons = [each["reason"] for each in found["dropped"]]
    assert figures["device"] == absent_h100s(1)[0].device_kind
    assert found["config"] == dataclasses.asdict(good)
    assert "exceeds available shared memory" in reasons[0]
    assert "flash_attention_dkv_mosaic_gpu_kernel spills" in reasons[1]
