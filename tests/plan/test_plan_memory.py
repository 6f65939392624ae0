"""A plan's bytes equal those of the model's abstract arrays, and decide what fits."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.config import PRESETS, SCOUT
from jaxmoe.errors import UserError
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import abstract_cache, round_capacity
from jaxmoe.model.params import abstract_params, num_params
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.memory import STEP, largest_context, memory
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.temporaries import LARGEST_BLOCK, expert_rows
from jaxmoe.plan.work import (
    STORAGE_FORMATS,
    Work,
    abstract_mesh,
    cache_bytes,
    check_mesh,
    stored_params,
    weight_bytes,
)
from jaxmoe.train.config import OptimizerConfig
from jaxmoe.train.optimizer import make_optimizer
from jaxmoe.train.state import abstract_state
from pallas_kernels.experts import make_group_metadata, rows_of_blocks
from pallas_kernels.quantized import quantize_matrix
from tests.tiers import slow_after_first

MESHES = ["data=1", "tensor=8", "expert=4,sequence=2", "data=2,fsdp=2,tensor=2", "fsdp=4,expert=2"]


def work(name="scout", **fields):
    return Work(config=PRESETS[name], **{"context": 100_000, **fields})


@pytest.mark.parametrize("spec", slow_after_first(reversed(MESHES)))
@pytest.mark.parametrize("format", STORAGE_FORMATS)
@pytest.mark.parametrize("name", PRESETS)
def test_weights_are_those_of_all_abstract_parameters(name, format, spec):
    """Catches a kind of layer counted wrongly, and an array left out."""
    planned, mesh = work(name, weights=format), MeshConfig.parse(spec)
    params = abstract_params(
        PRESETS[name], abstract_mesh(mesh), jnp.bfloat16, None if format == "bf16" else format
    )
    assert weight_bytes(planned, mesh) == device_bytes(params)


@pytest.mark.parametrize("format", STORAGE_FORMATS)
def test_parameters_are_counted_once_in_any_format(format):
    stored = [x for x in stored_params(PRESETS["maverick"], None if format == "bf16" else format)]
    counted = sum(x.numbers(MeshConfig()) for x in stored if not x.name.endswith(".scale"))
    assert counted == num_params(PRESETS["maverick"])


@pytest.mark.parametrize("rows, context", [(1, 1_000_000), (3, 5000), (64, 8192)])
@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
def test_cache_is_that_of_all_layers(kv, spec, rows, context):
    """Catches axes wrongly taken as equivalent, and page tables or coordinates left out."""
    mesh = MeshConfig.parse(spec)
    abstract, planned = abstract_mesh(mesh), work(rows=rows, context=context, kv=kv)
    capacity = round_capacity(context, abstract)
    cache = abstract_cache(planned.config, rows, capacity, planned.kv_dtype, abstract)
    assert cache_bytes(planned, mesh) == device_bytes(cache)


@pytest.mark.slow
@pytest.mark.parametrize("format", STORAGE_FORMATS)
@pytest.mark.parametrize("spec", ["tensor=16", "expert=3", "fsdp=7", "tensor=8,expert=16"])
def test_a_mesh_divides_as_abstract_parameters_say(spec, format):
    planned, mesh = work(weights=format), MeshConfig.parse(spec)
    try:
        abstract_params(planned.config, abstract_mesh(mesh), jnp.bfloat16, planned.format)
    except UserError:
        with pytest.raises(UserError, match="does not divide"):
            check_mesh(planned, mesh)
    else:
        check_mesh(planned, mesh)


def test_a_vocabulary_that_the_mesh_does_not_divide():
    """The vocabulary is padded, except in training, whose states must fit other meshes."""
    config, mesh = dataclasses.replace(SCOUT, vocab_size=201135), MeshConfig.parse("tensor=8")
    planned = Work(config=config, context=8192, rows=1)
    check_mesh(planned, mesh)
    params = abstract_params(config, abstract_mesh(mesh))
    assert params["embed"].shape[0] == 201136
    assert weight_bytes(planned, mesh) == device_bytes(params)
    with pytest.raises(UserError, match="does not divide the 201135"):
        check_mesh(dataclasses.replace(planned, task="train"), mesh)


@pytest.mark.parametrize("weights", ["bf16", "int4"])
@pytest.mark.parametrize(
    "items, experts, here", [(1000, 16, 16), (8192, 16, 16), (65536, 16, 2), (4096, 128, 16)]
)
def test_rows_of_experts_are_those_of_the_kernels_plan(monkeypatch, items, experts, here, weights):
    hopper = dataclasses.make_dataclass("Target", ["is_hopper"])(True)
    monkeypatch.setattr("pallas_kernels.experts.group_metadata.target", lambda: hopper)
    monkeypatch.setattr("pallas_kernels.experts.grouped.target", lambda: hopper)
    blocks = []

    def count(w):
        w = quantize_matrix(w, "int4") if weights == "int4" else w
        blocks.append(rows_of_blocks(items, experts, w))

    jax.eval_shape(count, jax.ShapeDtypeStruct((here, 5120, 8192), jnp.bfloat16))
    (block,) = blocks
    group = jax.ShapeDtypeStruct((items,), jnp.int32)
    plan = jax.eval_shape(lambda group: make_group_metadata(group, here, block), group)
    assert expert_rows(items, experts, here, LARGEST_BLOCK[weights]) == plan.item_of_row.shape[0]


@pytest.mark.parametrize("task", ["decode", "prefill"])
@pytest.mark.parametrize("spec", ["tensor=8", "tensor=4,sequence=2"])
def test_the_largest_context_is_the_largest(task, spec):
    target, mesh = parse_target("h100x8"), MeshConfig.parse(spec)
    planned = work(task=task)
    context = largest_context(planned, mesh, target)

    def peak(context):
        return memory(dataclasses.replace(planned, context=context), mesh).peak

    assert 0 < context < planned.config.max_position_embeddings
    assert peak(context) <= target.limit < peak(context + STEP + STEP * mesh.sequence)


def test_the_largest_context_is_none_or_the_models_own():
    mesh, target = MeshConfig(tensor=8), parse_target("h100x8")
    assert largest_context(work("maverick"), mesh, target) == 0
    small = work(weights="int4", kv="int4")
    assert largest_context(small, mesh, target) == small.config.max_position_embeddings


@pytest.mark.parametrize("spec", ["fsdp=8", "tensor=4,expert=2"])
def test_training_keeps_what_the_trainer_keeps(spec):
    """Weights and optimizer are those of the trainer's state, except for some scalars."""
    config = PRESETS["maverick"]
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1.0), 1)
    mesh = MeshConfig.parse(spec)
    devices = mesh.make()
    params = abstract_params(config, devices, jnp.float32, pads=False)
    state = abstract_state(params, optimizer, devices)
    needs = memory(work("maverick", task="train", context=8192, rows=8), mesh)
    assert needs.weights == device_bytes(state.params)
    assert needs.optimizer == pytest.approx(device_bytes(state.optimizer), abs=64)
    assert needs.gradients == needs.weights / 2  # in bfloat16


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"context": 20_000_000}, ["20000000", "10485760"]),
        ({"context": 0}, ["context 0"]),
        ({"rows": 0}, ["rows 0"]),
        ({"task": "train", "kv": "int8"}, ["training", "--kv"]),
    ],
)
def test_work_that_cannot_be(fields, words):
    with pytest.raises(UserError) as caught:
        work(**fields)
    assert all(word in str(caught.value) for word in words)
