"""Steps that try drafts: what they bring by the plan, and read when compiled for absent H100s."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxmoe.config import SCOUT
from jaxmoe.errors import UserError
from jaxmoe.generation.batches import line_of
from jaxmoe.generation.choices import hidden_at
from jaxmoe.mesh import MeshConfig, sharding
from jaxmoe.model.kv_cache import abstract_cache
from jaxmoe.model.packing import Packing
from jaxmoe.model.params import abstract_params
from jaxmoe.model.steps import Inputs, step
from jaxmoe.plan.drafts import drafted_steps
from jaxmoe.plan.operations import entry_operations
from jaxmoe.plan.planner import make_plan
from jaxmoe.plan.share import device_share
from jaxmoe.plan.speed import busy_experts, demand
from jaxmoe.plan.targets import absent_devices, parse_target
from jaxmoe.plan.traffic import Traffic
from jaxmoe.plan.work import Work
from pallas_kernels.compile.absent import compiler_options

CONTEXT, TRIED = 131072, 4
CONFIG = dataclasses.replace(SCOUT, layers=SCOUT.layers[:4])  # three of chunks, and a global one
EXPERTS = CONFIG.num_local_experts
LAYER = re.compile(r"cache\.layers\[\d+\]\.[kv]$")
WITHIN = 1.15


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step's program for one device.

    Attributes:
        rows: of the device, each with a context's keys.
        held: its experts of a layer.
        text: the optimized HLO.
    """

    rows: int
    held: int
    text: str

    def nbytes(self, busy: float) -> float:
        """Bytes that its operations read and write.

        A kernel of decode attention has the pools as operands, which count once; it reads the keys
        of a row again for each line of it (a line's tasks have each block of its keys once, by
        tests/pallas_kernels/attention/test_decode_tasks.py).

        Args:
            busy: how many of its experts the device reads.
        """
        share = min(1.0, busy / self.held)
        traffic = Traffic(self.text, lambda name: share if "['experts']" in name else 1.0)
        operations = entry_operations(self.text)
        assert not any(x.inside for x in operations)  # which would count once
        total = sum(traffic.of(x.name) for x in operations)
        attends = [x.name for x in operations if "/decode_attention/" in x.op]
        assert len(attends) == len(CONFIG.layers)
        (lines,) = {traffic.operand_shapes(name)[0][0] for name in attends}
        return total + (lines / self.rows - 1) * sum(self.pools)

    @property
    def pools(self) -> list[int]:
        """Bytes of each layer's keys, and of its values."""
        found = [n for name, n in Traffic(self.text).parameters().items() if LAYER.match(name)]
        assert len(found) == 2 * len(CONFIG.layers)
        return found

    @property
    def largest_move(self) -> int:
        """Bytes that an operation which is no kernel moves, at most; in place what changes."""
        traffic, operations = Traffic(self.text), entry_operations(self.text)
        return max(traffic.of(x.name) for x in operations if x.kind != "custom-call")


def compiled(spec: str, rows: int, lines: int, tokens: int) -> Compiled:
    """The step of so many lines of so many tokens, of some rows with a context each."""
    sizes = MeshConfig.parse(spec)
    mesh = sizes.make(absent_devices(parse_target("h100x8")))

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, PartitionSpec()))

    new, places = array(lines, tokens), array(1, lines * tokens)
    params = abstract_params(CONFIG, mesh, jnp.bfloat16)
    cache = abstract_cache(CONFIG, rows, CONTEXT, jnp.bfloat16, mesh)
    options = {"readout": hidden_at, "arguments": (places,), "packing": Packing(new)}
    options |= {"restart": array(rows, dtype=jnp.bool_), "previous": array(1, rows)}
    with jax.set_mesh(mesh):
        lowered = step.lower(CONFIG, params, Inputs(new, new, new), cache, **options)
    text = lowered.compile(compiler_options()).as_text()
    return Compiled(rows, EXPERTS // sizes.expert, text)


def planned(spec: str, rows: int, tokens: int) -> tuple[float, float]:
    """Bytes that the plan says a device reads, without the unembedding; and experts, on average."""
    mesh, reads = MeshConfig.parse(spec), {"task": "prefill", "prefill_chunk": tokens}
    work = Work(config=CONFIG, context=CONTEXT, rows=rows, **reads)
    need, unembedding = demand(work, mesh), 2 * CONFIG.vocab_size * CONFIG.hidden_size / mesh.tensor
    busy = busy_experts(work, mesh, device_share(work, mesh)) * EXPERTS / mesh.expert
    return need.weights + need.cache - unembedding, busy


@pytest.mark.slow
@pytest.mark.absent_gpu
@pytest.mark.parametrize(("spec", "rows"), [("tensor=8", 1), ("tensor=8", 8), ("expert=8", 1)])
def test_four_tokens_of_a_row_take_the_bytes_of_one(spec, rows):
    """But for more experts that they choose: with the same ones, or all; the cache is not copied.

    In lines of their own, as on CPUs, each token reads its row's keys again, which this would find.
    """
    assert line_of(CONFIG, "gpu") == TRIED
    one, four = compiled(spec, rows, rows, 1), compiled(spec, rows, rows, TRIED)
    assert four.nbytes(1) < WITHIN * one.nbytes(1)
    if rows > 1:
        assert compiled(spec, rows, rows * TRIED, 1).nbytes(1) > WITHIN * one.nbytes(1)
    assert four.nbytes(EXPERTS) < WITHIN * one.nbytes(EXPERTS)
    assert four.largest_move < min(four.pools)
    for found, tokens in ((one, 1), (four, TRIED)):
        nbytes, busy = planned(spec, rows, tokens)
        assert found.nbytes(busy) == pytest.approx(nbytes, rel=0.05)


def test_what_drafts_bring_by_the_bounds():
    """A share that is needed brings as many tokens as the step takes longer."""
    mesh = MeshConfig(tensor=8)
    work = Work(config=SCOUT, context=CONTEXT)
    plan = make_plan("scout", work, parse_target("h100x8"), mesh)
    for step_ in drafted_steps(plan, 3, [0.7, 0.6]):
        one = dataclasses.replace(work, task="prefill", prefill_chunk=1 + step_.drafts)
        more = demand(one, mesh).weights - plan.chosen.demand.weights
        assert step_.seconds - plan.estimate == pytest.approx(
            more / plan.target.bandwidth, rel=0.01
        )
        (again,) = drafted_steps(plan, step_.drafts, [step_.needed])[-1:]
        assert again.faster == pytest.approx(1)
    assert drafted_steps(plan, 3, [0.7, 0.6])[-1].tokens == pytest.approx(1 + 0.7 + 0.42 + 0.252)


@pytest.mark.parametrize(
    ("target", "task", "most", "accepted", "words"),
    [
        ("h100x8", "prefill", 3, [], "goes with --task decode"),
        ("h100x8", "decode", 0, [], "--drafts 0 is below 1"),
        ("h100x8", "decode", 4, [], "--drafts 4: a row has at most 3 on h100x8"),
        ("v5p-16", "decode", 1, [], "--drafts 1: a row has at most 0 on v5p-16"),
        ("h100x8", "decode", 2, [1.5], "--accepted 1.5 has shares"),
    ],
)
def test_drafts_that_cannot_be(target, task, most, accepted, words):
    work = Work(config=SCOUT, context=CONTEXT, task=task)
    plan = make_plan("scout", work, parse_target(target), MeshConfig(tensor=8))
    with pytest.raises(UserError, match=words):
        drafted_steps(plan, most, accepted)
