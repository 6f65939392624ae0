"""The vision tower at full size: counted, and compiled for absent GPUs and TPUs beside the plan."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.config import MAVERICK, SCOUT, VisionConfig
from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import abstract_params, num_params
from jaxmoe.model.vision import tile_features
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.planner import make_plan
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.vision import tile_flops, tower_collectives, tower_flops, tower_temporaries
from jaxmoe.plan.work import Work
from pallas_kernels.compile.absent import absent_h100s, absent_tpus, compiler_options

TOWER = {"tower": 811_115_008, "adapter": 39_845_888, "projector": 20_971_520}
TEXT = {"scout": (SCOUT, 107_769_861_120), "maverick": (MAVERICK, 400_711_848_960)}
SEEING = dataclasses.replace(SCOUT, layers=SCOUT.layers[:1], vision=VisionConfig())
SMALL = dataclasses.replace(SEEING, vision=VisionConfig(num_hidden_layers=2))


def work(config, tiles, **options):
    return Work(config=config, task="prefill", context=8192, tiles=tiles, **options)


def compiled(mesh, devices, tiles, options):
    placed = MeshConfig.parse(mesh).make(devices)
    with jax.set_mesh(placed):
        params = abstract_params(SMALL, placed)["vision"]
        pixels = jax.ShapeDtypeStruct((tiles, 336, 336, 3), jnp.uint8)
        run = jax.jit(lambda params, pixels: tile_features(SMALL, params, pixels))
        return params, run.lower(params, pixels).compile(options)


@pytest.mark.parametrize("name", TEXT)
def test_parameters_of_the_multimodal_models(name):
    config, text = TEXT[name]
    seeing = dataclasses.replace(config, vision=VisionConfig())
    assert num_params(seeing) == text + sum(TOWER.values())


def test_operations_of_a_tile():
    assert tile_flops(SEEING) == pytest.approx(1.016e12, rel=1e-3)


@pytest.mark.absent_gpu
@pytest.mark.parametrize(("mesh", "tiles"), [("tensor=8", 16), ("tensor=8", 4), ("fsdp=8", 16)])
def test_compiled_for_eight_h100s(mesh, tiles):
    """Attention by the kernel, scores of no tile in memory, and bytes as planned."""
    params, program = compiled(mesh, absent_h100s(8), tiles, compiler_options())
    text, memory = program.as_text(), program.memory_analysis()
    assert "577,577" not in text and "mosaic_gpu" in text
    planned = tower_temporaries(work(SMALL, tiles), MeshConfig.parse(mesh))
    assert memory.temp_size_in_bytes == pytest.approx(planned, rel=0.05)
    pixels = memory.argument_size_in_bytes - device_bytes(params)
    assert 0 <= pixels <= tiles * 336 * 336 * 3 + 4096


@pytest.mark.absent_tpu
def test_compiled_for_a_v5p():
    """Attention by the kernel, operations as planned, and no exchange but of weights."""
    _, program = compiled("tensor=8", absent_tpus("v5p:2x2x2"), 16, {})
    text = program.as_text()
    assert "577,577" not in text and "tpu_custom_call" in text
    planned = tower_flops(work(SMALL, 16), MeshConfig(tensor=8))
    assert program.cost_analysis()["flops"] == pytest.approx(planned, rel=0.05)
    assert not re.search(r"all-(reduce|to-all)[^=]*=[^=]*,577,", text)


def test_devices_with_tiles_of_their_own_send_less():
    """One whole batch spreads over all devices; fewer tiles share heads and sum."""
    mesh = MeshConfig(tensor=8)

    def sent(tiles):
        return sum(x.sent(mesh)[0] for x in tower_collectives(work(SEEING, tiles), mesh))

    whole, few = (sent(tiles) / tiles for tiles in (16, 4))
    assert whole < few / 3


@pytest.mark.parametrize(("tiles", "here"), [(16, 2), (17, 3), (5, 5)])
def test_batches_are_those_of_the_engine(tiles, here):
    """A device has an equal part of a batch of 16 tiles, and all of a batch of 4 or of 1."""
    planned = tower_flops(work(SEEING, tiles), MeshConfig(fsdp=8))
    assert planned == pytest.approx(here * tile_flops(SEEING))


def test_a_plan_with_images():
    target, mesh = parse_target("h100x8"), MeshConfig(tensor=8)
    seen = make_plan("scout", work(SEEING, 16), target, mesh).chosen
    text = make_plan("scout", work(SEEING, 0), target, mesh).chosen
    assert seen.memory.features == 128 * 144 * 5120 * 2 and text.memory.features == 0
    extra = seen.demand.flops - text.demand.flops
    assert extra == pytest.approx(2 * tile_flops(SEEING))
    assert seen.demand.weights - text.demand.weights == pytest.approx(2 * sum(TOWER.values()))


def test_tiles_that_cannot_be():
    with pytest.raises(UserError, match="vision tower"):
        work(SCOUT, 1)
    with pytest.raises(UserError, match="no step of decoding"):
        decoding = Work(config=SEEING, context=8192, tiles=1)
        make_plan("scout", decoding, parse_target("h100x8"), None)
    with pytest.raises(UserError, match="8352 tokens, more than 1 row"):
        make_plan("scout", work(SEEING, 58), parse_target("h100x8"), None)
