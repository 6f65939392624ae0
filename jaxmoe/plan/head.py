"""A draft head beside a model: its memory on a device, and how long its guesses take at least.

Operations and collectives of a pass were counted in a chain compiled for eight H100s, which
tests/plan/test_plan_head.py checks. Guesses come one after the other, so that with few rows most of
their time is between operations.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from jaxmoe.eagle_config import STATES, EagleConfig
from jaxmoe.generation.batches import STEP_TOKENS
from jaxmoe.generation.drafts import GUESSES, places_of_row
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.eagle import DraftCache, abstract_draft_cache, abstract_eagle
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.links import Collective
from jaxmoe.plan.targets import Target
from jaxmoe.plan.work import Work, abstract_mesh, parts_of_rows

DTYPE = jnp.dtype("bfloat16")
INDEX = 4  # bytes of a token's id
LAUNCHES = 44  # of a pass with its guess, collectives apart


def head_bytes(work: Work, mesh: MeshConfig) -> int:
    """Bytes of a step's head on one device: parameters, vocabulary, keys and values, states.

    These are of the step's rows; an engine has a few more, which hold prefixes that rows share.
    The table of embeddings is the model's. What a chain allocates while it runs is less than what
    a step of the model does, which has ended by then.
    """
    if work.head is None:
        return 0
    ids, states = work.head.draft_vocab_size * INDEX, STATES * work.head.hidden_size
    kept = work.rows * states * DTYPE.itemsize
    return _params_bytes(work.head, mesh) + device_bytes(_cache(work, mesh)) + ids + kept


def guess_seconds(work: Work, mesh: MeshConfig, target: Target, count: int) -> float:
    """Seconds that guessing `count` tokens of each row takes at least; 0 without a head.

    Each pass reads the head's parameters, but for the one that fuses the model's states, which the
    first pass reads, and the keys of a device's rows. Parameters are gathered over `fsdp` once.
    """
    if work.head is None:
        return 0.0
    gathered = dataclasses.replace(mesh, fsdp=1)
    whole = _params_bytes(work.head, gathered)
    fuses = STATES * work.head.hidden_size**2 * DTYPE.itemsize
    keys = device_bytes(_cache(work, mesh)) // parts_of_rows(work, mesh)
    read = fuses + count * (whole - fuses + keys)
    gather = Collective("all-gather", ("fsdp",), whole) if mesh.fsdp > 1 else None
    waits = count * _wait(_of_pass(work, mesh), mesh, target)
    waits += _wait([gather], mesh, target) if gather else 0.0
    return read / target.bandwidth + count * LAUNCHES * target.launch + waits


def _wait(collectives: Sequence[Collective], mesh: MeshConfig, target: Target) -> float:
    return math.fsum(x.seconds(mesh, target) + x.latency(mesh, target) for x in collectives)


def _params_bytes(head: EagleConfig, mesh: MeshConfig) -> int:
    return device_bytes(abstract_eagle(head, abstract_mesh(mesh), DTYPE))


def _cache(work: Work, mesh: MeshConfig) -> DraftCache:
    assert work.head is not None
    places = places_of_row(work.context, STEP_TOKENS, GUESSES)
    return abstract_draft_cache(work.head, work.rows, places, DTYPE, abstract_mesh(mesh))


def _of_pass(work: Work, mesh: MeshConfig) -> list[Collective]:
    """The sums of embedding, attention and feed-forward, and the likeliest token's place."""
    if mesh.tensor == 1:
        return []
    rows = work.rows // parts_of_rows(work, mesh)
    hidden = rows * work.config.hidden_size * DTYPE.itemsize
    sums = Collective("all-reduce", ("tensor",), hidden, count=3)
    likeliest = 2 * mesh.tensor * rows * INDEX  # of each device's part of the vocabulary
    return [sums, Collective("all-gather", ("tensor",), likeliest)]
