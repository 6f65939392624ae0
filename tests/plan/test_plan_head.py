"""A head in a plan: its memory and its operations, as arrays and the compiler have them."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxmoe.checkpoint.heads import Head
from jaxmoe.cli import plan
from jaxmoe.config import SCOUT
from jaxmoe.eagle_config import eagle_from_hf
from jaxmoe.errors import UserError
from jaxmoe.generation.drafts import GUESSES, PLACES
from jaxmoe.generation.engine import Engine, Request
from jaxmoe.generation.sampling import Sampling
from jaxmoe.hf_config import from_hf
from jaxmoe.mesh import MeshConfig, sharding
from jaxmoe.model.eagle import abstract_draft_cache, abstract_eagle, init_eagle
from jaxmoe.model.eagle_unroll import draft_chain
from jaxmoe.model.kv_cache import capacity_of
from jaxmoe.model.params import abstract_params, init_params
from jaxmoe.plan import head
from jaxmoe.plan.drafts import drafted_steps
from jaxmoe.plan.head import LAUNCHES, guess_seconds, head_bytes
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.operations import count_kinds, entry_operations
from jaxmoe.plan.planner import make_plan
from jaxmoe.plan.targets import parse_target
from jaxmoe.plan.work import Work
from pallas_kernels.compile.absent import absent_h100s, compiler_options
from tests import tiny
from tests.eagle import head_config

ROOT = Path(__file__).parents[2]
DEMO, HEAD = str(ROOT / "demo/model"), str(ROOT / "demo/eagle/head")
SCOUT_SIZES = {
    "hidden_size": 5120, "intermediate_size": 32768, "head_dim": 128, "num_attention_heads": 40,
    "num_key_value_heads": 8, "vocab_size": 202048, "draft_vocab_size": 32000,
}  # fmt: skip
SCOUT_HEAD, _ = eagle_from_hf(head_config(**SCOUT_SIZES), "head", SCOUT)
ROWS, TENSOR = 16, MeshConfig(tensor=8)
WORK = Work(config=SCOUT, context=131072, rows=ROWS, head=SCOUT_HEAD)


@pytest.mark.parametrize("spec", ["data=2,tensor=2", "expert=2,fsdp=2"])
def test_memory_is_that_of_the_engine(spec):
    """All arrays that an engine keeps for its head, on a device of a mesh."""
    target, sizes = from_hf(tiny.scout_like(), "tiny"), MeshConfig.parse(spec)
    config, _ = eagle_from_hf(head_config(), "head", target)
    mesh = sizes.make(jax.devices()[:4])
    with jax.set_mesh(mesh):
        params = init_params(target, jax.random.key(0), jnp.bfloat16)
        like = (
            abstract_params(target, mesh, jnp.bfloat16),
            abstract_eagle(config, mesh, jnp.bfloat16),
        )
        given = params, init_eagle(config, jax.random.key(1), jnp.bfloat16)
        params, of_head = jax.device_put(given, jax.tree.map(lambda x: x.sharding, like))
        ids = jax.device_put(jnp.arange(48), sharding(mesh, PartitionSpec()))
        request = Request(0, (1, 2), 40, Sampling())
        options = {"drafts": GUESSES, "head": Head(config, of_head, ids)}
        engine = Engine(target, params, [request], rows=4, **options)
        assert engine.head is not None
        kept = of_head, ids, engine.head._memory
    rows = len(engine.head._memory.last)  # with some for prefixes
    work = Work(config=target, context=capacity_of(engine.cache), rows=rows, head=config)
    assert head_bytes(work, sizes) == device_bytes(kept)
    assert make_plan("tiny", work, parse_target("h100x4"), sizes).chosen.memory.head


@pytest.mark.slow
@pytest.mark.absent_gpu
def test_a_chain_is_what_the_plan_says_when_compiled_for_h100s():
    """Its cache is read in place: all temporary arrays are smaller than its keys."""
    mesh = TENSOR.make(absent_h100s(8))

    def array(shape, dtype=jnp.int32, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, PartitionSpec(*axes)))

    with jax.set_mesh(mesh):
        cache = abstract_draft_cache(SCOUT_HEAD, ROWS, PLACES, jnp.bfloat16, mesh)
        params = abstract_eagle(SCOUT_HEAD, mesh, jnp.bfloat16)
        table, new = array((202048, 5120), jnp.bfloat16, "tensor"), array((ROWS, 4))
        states, ids = array((ROWS, 4, 3 * 5120), jnp.bfloat16), array((32000,))
        lowered = jax.jit(draft_chain, static_argnums=(0, 9), donate_argnums=8).lower(
            SCOUT_HEAD, params, table, ids, new, states, new, new, cache, 3, array((ROWS,))
        )
    program = lowered.compile(compiler_options())
    sizes, keys = program.memory_analysis(), device_bytes(cache.k)
    assert sizes.temp_size_in_bytes < keys
    given = sizes.argument_size_in_bytes - device_bytes((table, new, states, new, new))
    kept = 2 * ROWS * 3 * 5120  # states of the last tokens of prompts, for the pass over the next
    assert head_bytes(WORK, TENSOR) - kept == pytest.approx(given, rel=1e-5)

    operations = entry_operations(program)
    (loop,) = (x for x in operations if x.inside)
    for found in (loop.inside, [x for x in operations if x is not loop]):
        kinds = count_kinds(found)
        assert kinds["custom-call"] == 2, "the kernels of attention were not found"
        assert (kinds["all-reduce"], kinds["all-gather"]) == (3, 1)
        assert abs(kinds.total() - 4 - LAUNCHES) <= 6


def test_guesses_take_time_by_the_bounds():
    """Three read the head and its keys three times, and wait for four collectives each."""
    target = parse_target("h100x8")
    one, three = (guess_seconds(WORK, TENSOR, target, count) for count in (1, 3))
    numbers = 2 * 5120 * (40 + 16) * 128 + 40 * 128 * 5120 + 3 * 5120 * 32768 + 5120 * 32000
    read = 2 * numbers / 8 + 2 * 2 * ROWS * PLACES * 128
    sent = 3 * 2 * (7 / 8) * 2 * ROWS * 5120 + 7 / 8 * 2 * 8 * ROWS * 4
    waits = LAUNCHES * target.launch + 4 * target.latency + sent / target.interconnect
    assert (three - one) / 2 == pytest.approx(read / target.bandwidth + waits, rel=1e-4)
    plan = make_plan("scout", WORK, target, TENSOR)
    without = make_plan("scout", Work(config=SCOUT, context=131072, rows=ROWS), target, TENSOR)
    (*_, with_head), (*_, free) = drafted_steps(plan, 3), drafted_steps(without, 3)
    assert with_head.guessing == three and not free.guessing
    assert with_head.seconds == pytest.approx(free.seconds + three)
    short = dataclasses.replace(WORK, context=8192 // 2)
    saved = three - guess_seconds(short, TENSOR, target, 3)
    assert saved == pytest.approx(3 * 2 * 2 * ROWS * PLACES / 2 * 128 / target.bandwidth)


def test_meshes_that_divide_rows_gather():
    """A pass has four gathers more, and a chain one for each matrix with `fsdp`."""
    target, seconds = parse_target("h100x8"), {}
    free = dataclasses.replace(target, latency=0.0)
    for spec in ("data=8", "fsdp=8", "fsdp=2,tensor=4"):
        mesh = MeshConfig.parse(spec)
        slow, fast = (guess_seconds(WORK, mesh, x, 3) for x in (target, free))
        seconds[spec] = (slow - fast) / target.latency
    assert seconds == pytest.approx(
        {"data=8": 3 * 4, "fsdp=8": 3 * 4 + 9, "fsdp=2,tensor=4": 3 * 8 + 9}
    )
    matrices = sum(x.nbytes for x in head._of_parameters(SCOUT_HEAD, MeshConfig(tensor=4)))
    whole = sum(x.nbytes for x in head._of_parameters(SCOUT_HEAD, MeshConfig()))
    fc = 2 * 3 * 5120**2  # which devices along `tensor` have whole
    assert matrices - fc == (whole - fc) / 4


def planned(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["plan", *args])
    plan.main()


def test_a_plan_with_the_demos_head(monkeypatch, capsys):
    arguments = DEMO, "--target", "h100x1", "--head", HEAD, "--drafts", "2"
    planned(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert "guessing" in printed and "head" in printed
    planned(monkeypatch, *arguments, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["formula"]["head"] > 0 and found["drafts"][1]["guessing"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scout", "--head", HEAD], "it is the head of another model"),
        ([DEMO, "--head", HEAD, "--target", "v5p-8"], "no drafts on v5p-8"),
        (["scout", "--head", DEMO], "jaxmoe convert HEAD OUTPUT --target"),
        (
            [DEMO, "--head", HEAD, "--task", "train", "--context", "64"],
            "leave out --head",
        ),
    ],
)
def test_heads_that_cannot_be(monkeypatch, arguments, words):
    with pytest.raises(UserError, match=words):
        planned(monkeypatch, "--target", "h100x1", *arguments)


def test_a_mesh_that_does_not_divide_the_head():
    narrow, _ = eagle_from_hf(head_config(**SCOUT_SIZES | {"draft_vocab_size": 32004}), "h", SCOUT)
    work = Work(config=SCOUT, context=8192, head=narrow)
    with pytest.raises(UserError, match=r"head\.lm_head"):
        make_plan("scout", work, parse_target("h100x8"), TENSOR)
