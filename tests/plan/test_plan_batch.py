"""The engine's step and the choice of tokens, compiled for eight absent H100s."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxmoe.config import SCOUT
from jaxmoe.generation.choices import State, choose_tokens, hidden_at
from jaxmoe.generation.counts import Counts
from jaxmoe.generation.sampler import Bias, Choice, Draws, Penalties
from jaxmoe.mesh import MeshConfig, sharding
from jaxmoe.model.kv_cache import abstract_cache
from jaxmoe.model.params import abstract_params
from jaxmoe.model.steps import step
from jaxmoe.plan.steps import abstract_batch
from jaxmoe.plan.targets import absent_devices, parse_target
from jaxmoe.plan.temporaries import batch_temporaries
from jaxmoe.plan.work import Work
from pallas_kernels.compile.absent import compiler_options

ROWS, HOLDERS, TOKENS, CONTEXT = 64, 4, 2048, 131072
CONFIG = dataclasses.replace(SCOUT, layers=SCOUT.layers[2:4])  # a local one and a global one
MESH = MeshConfig(tensor=8)
WORK = Work(config=CONFIG, context=CONTEXT, rows=ROWS)


@pytest.fixture(scope="module")
def mesh():
    return MESH.make(absent_devices(parse_target("h100x8")))


def array(mesh, shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, PartitionSpec(*axes)))


def compile_choice(mesh, choice, counts, top):
    params = abstract_params(CONFIG, mesh, jnp.bfloat16)
    hidden = array(mesh, (ROWS, CONFIG.hidden_size), jnp.bfloat16)
    targets = array(mesh, (1, ROWS), jnp.int32)
    state = State(array(mesh, (1, ROWS), jnp.int32), counts)
    with jax.set_mesh(mesh):
        arguments = CONFIG, params, hidden, targets, targets, choice, state, top
        return choose_tokens.lower(*arguments).compile(compiler_options())


def everything(mesh):
    """All settings, and penalties' counts."""
    V = CONFIG.vocab_size
    floats, ints, hashes = (
        array(mesh, (ROWS,), dtype) for dtype in (jnp.float32, jnp.int32, jnp.uint32)
    )
    biases = (array(mesh, (ROWS, 8), dtype) for dtype in (jnp.int32, jnp.float32))
    counts = (array(mesh, (ROWS, V), x, None, "tensor") for x in (jnp.int16, jnp.bool_))
    draws = Draws(ints, hashes, ints, floats, ints, floats, floats)
    allowed = array(mesh, (ROWS, V // 32), jnp.uint32)
    choice = Choice(draws, Penalties(floats, floats, floats), Bias(*biases), allowed)
    return choice, Counts(*counts)


@pytest.mark.absent_gpu
def test_a_step_takes_what_the_plan_says(mesh):
    """With 64 rows that write beside prompts, its temporaries are those of the formula."""
    cache = abstract_cache(CONFIG, ROWS + HOLDERS, CONTEXT, jnp.bfloat16, mesh, tokens=CONTEXT)
    inputs, options = abstract_batch(mesh, groups=1, rows=ROWS + HOLDERS, tokens=TOKENS)
    params = abstract_params(CONFIG, mesh, jnp.bfloat16)
    options |= {"readout": hidden_at, "arguments": (array(mesh, (1, ROWS), jnp.int32),)}
    with jax.set_mesh(mesh):
        lowered = step.lower(CONFIG, params, inputs, cache, **options)
    compiled = lowered.compile(compiler_options())
    planned = batch_temporaries(WORK, MESH, TOKENS)
    assert planned == pytest.approx(compiled.memory_analysis().temp_size_in_bytes, rel=1 / 3)
    assert " sort(" not in compiled.as_text()


@pytest.mark.absent_gpu
@pytest.mark.parametrize("top", [None, 20], ids=["greedy", "everything"])
def test_no_device_has_all_logits_of_a_row(mesh, top):
    """Not with top-k, top-p, min-p, penalties, masks and log-probabilities; nor is there a sort."""
    choice, counts = everything(mesh) if top else (Choice(), None)
    compiled = compile_choice(mesh, choice, counts, top)
    text = compiled.as_text()
    assert not re.findall(rf"\w+\[[\d,]*{CONFIG.vocab_size}[\d,]*\]", text)
    sorted_ = re.findall(r"(\w+\[[\d,]*\])[^=\n]*(?:sort|TopK)\(", text)
    assert all(str(CONFIG.vocab_size // 8) not in shape for shape in sorted_)
    assert compiled.memory_analysis().temp_size_in_bytes < batch_temporaries(WORK, MESH, 1)
