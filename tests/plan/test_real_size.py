"""Scout and Maverick at full size: parameters counted, steps compiled for absent GPUs."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.config import PRESETS, layer_kinds
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import PAGE, round_capacity
from jaxmoe.model.params import num_params
from jaxmoe.plan.layout import device_bytes, layout_table
from jaxmoe.plan.steps import abstract_arguments, lower_step
from pallas_kernels.compile.absent import absent_h100s, compiler_options

PARAMETERS = {"scout": 107_769_861_120, "maverick": 400_711_848_960}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    assert num_params(PRESETS[name]) == PARAMETERS[name]


@pytest.mark.parametrize("tokens", [1, 8192], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", PRESETS)
def test_lowers_at_full_size(name, tokens):
    mesh = MeshConfig.parse("expert=4,tensor=2").make()
    arguments = abstract_arguments(
        PRESETS[name], mesh, rows=1, tokens=tokens, capacity=round_capacity(131072, mesh)
    )
    lowered = lower_step(PRESETS[name], mesh, arguments)
    logits, cache = lowered.out_info
    assert logits.shape == (1, 202048)
    assert len(cache.layers) == 48


def decode_bytes(config, rows: int, capacity: int) -> int:
    """Argument bytes of a decode step on each device of tensor=8, with bf16 weights and cache."""
    embed, layers = config.hidden_size, config.num_hidden_layers
    routers = sum(kind.feed_forward == "moe" for kind in config.layers) * config.num_local_experts
    replicated = embed * (2 * layers + 1 + routers)  # norms and routers
    weights = replicated + (num_params(config) - replicated) // 8
    pages = (rows * tokens // PAGE for tokens in (capacity, 8192))
    log, ring = (n + 8 for n in pages)  # with the null page, a multiple of 8
    keys_and_values = 2 * config.head_dim * PAGE * (12 * log + 36 * ring)  # one head of 8
    coordinates_and_owners = (2 * PAGE + 1) * (log + ring)
    tables_and_lengths = rows * (capacity + 8192) // PAGE + 2 * rows  # and where pages begin
    new_tokens = 3 * rows
    integers = coordinates_and_owners + tables_and_lengths + new_tokens
    return 2 * (weights + keys_and_values) + 4 * integers


@pytest.mark.parametrize("name", PRESETS)
def test_decode_bytes(name):
    mesh = MeshConfig(tensor=8).make()
    arguments = abstract_arguments(PRESETS[name], mesh, rows=4, tokens=1, capacity=131072)
    assert device_bytes(arguments) == decode_bytes(PRESETS[name], 4, 131072)


@pytest.mark.absent_gpu
def test_fsdp_gathers_one_layer_at_a_time():
    """Twice as many layers take no more temporary memory."""
    temporary = []
    for layers in (2, 4):
        kinds = layer_kinds(layers, nope_interval=2)
        config = dataclasses.replace(PRESETS["scout"], layers=kinds)
        mesh = MeshConfig(fsdp=8).make(absent_h100s(8))
        arguments = abstract_arguments(config, mesh, rows=8, tokens=1, capacity=8192)
        memory = lower_step(config, mesh, arguments).compile(compiler_options()).memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[1] < 1.05 * temporary[0]


@pytest.mark.absent_gpu
@pytest.mark.parametrize("name, mesh", [("scout", "tensor=8"), ("maverick", "expert=8")])
def test_decode_step_compiles_for_eight_h100s(name, mesh):
    """Arguments have the formula's bytes, and the cache is updated in place.

    Devices exchange activations, never weights or cache.
    """
    config, mesh = PRESETS[name], MeshConfig.parse(mesh).make(absent_h100s(8))
    arguments = abstract_arguments(
        config, mesh, rows=8, tokens=1, capacity=round_capacity(100_000, mesh)
    )
    compiled = lower_step(config, mesh, arguments).compile(compiler_options())
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == device_bytes(arguments)
    assert memory.alias_size_in_bytes == device_bytes(arguments[-1])
    assert memory.temp_size_in_bytes < 256 * 2**20
    assert 0 < largest_exchange(compiled.as_text()) < 2**20


@pytest.mark.absent_gpu
def test_prefill_of_a_segment_against_ten_million_tokens():
    """Temporaries of the whole model do not grow with its layers or with the cache.

    With tensor=8 every GPU holds ten million keys of one key head for each global layer.
    """
    mesh = MeshConfig(tensor=8).make(absent_h100s(8))
    capacity = round_capacity(10_000_000, mesh)
    arguments = abstract_arguments(
        PRESETS["scout"], mesh, rows=1, tokens=8192, capacity=capacity, kv=jnp.bfloat16
    )
    compiled = lower_step(PRESETS["scout"], mesh, arguments).compile(compiler_options())
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == device_bytes(arguments[-1])
    assert memory.temp_size_in_bytes < 2**30
    assert "mosaic_gpu" in compiled.as_text()


def largest_exchange(hlo: str) -> int:
    """Bytes of the largest result of a collective in the program."""
    collectives = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    sizes = [0]
    for shapes, _ in re.findall(rf"= ([^=\n]*?) ({collectives})(?:-start)?\(", hlo):
        for kind, shape in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", shapes):
            bits = int(re.sub("[a-z]", "", kind))
            sizes.append(bits // 8 * math.prod(int(size) for size in shape.split(",") if size))
    return max(sizes)


def test_layout_table_covers_every_byte():
    mesh = MeshConfig.parse("expert=4,tensor=2").make()
    config = PRESETS["maverick"]
    arguments = abstract_arguments(config, mesh, rows=1, tokens=1, capacity=64)
    table = layout_table(config, arguments[0], mesh)
    total = list(table.columns[-1].cells)[-1]
    assert total == f"{device_bytes(arguments[0]) / 2**20:,.1f}"
    assert sum(int(cell) for cell in list(table.columns[1].cells)[:-1]) == len(
        jax.tree.leaves(arguments[0])
    )
