"""A draft head beside a model, in bfloat16: its memory on a device, and the time of its guesses.

Operations and collectives of a pass were counted in a chain compiled for eight H100s with
`tensor=8`, which tests/plan/test_plan_head.py checks. Guesses come one after the other, so that
with few rows most of their time is between operations.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxmoe.eagle_config import STATES, EagleConfig
from jaxmoe.generation.batches import STEP_TOKENS
from jaxmoe.generation.drafts import GUESSES, PLACES, places_of_row
from jaxmoe.mesh import MeshConfig, activation_axes
from jaxmoe.model.eagle import abstract_draft_cache, abstract_eagle, eagle_specs
from jaxmoe.model.param_spec import is_spec
from jaxmoe.plan.layout import device_bytes
from jaxmoe.plan.links import Collective, spread
from jaxmoe.plan.share import device_share
from jaxmoe.plan.targets import Target
from jaxmoe.plan.work import Work, abstract_mesh

DTYPE = jnp.dtype("bfloat16")
INDEX = 4  # bytes of a token's id
LAUNCHES = 44  # of a pass with its guess, collectives apart


def head_bytes(work: Work, mesh: MeshConfig) -> int:
    """Bytes of a step's head on one device: parameters, vocabulary, keys and values, states.

    These are of the step's rows; an engine has a few more, which hold prefixes that rows share.
    The table of embeddings is the model's. What a chain allocates while it runs is not counted: a
    step of the model has ended by then.
    """
    if work.head is None:
        return 0
    ids, states = work.head.draft_vocab_size * INDEX, STATES * work.head.hidden_size
    kept = work.rows * states * DTYPE.itemsize
    places = places_of_row(work.context, STEP_TOKENS, GUESSES)
    cache = abstract_draft_cache(work.head, work.rows, places, DTYPE, abstract_mesh(mesh))
    return _params_bytes(work.head, mesh) + device_bytes(cache) + ids + kept


def guess_seconds(work: Work, mesh: MeshConfig, target: Target, count: int) -> float:
    """Seconds of guessing `count` tokens of each row with a full context; 0 without a head.

    Each pass reads the head's parameters, but for the one that fuses the model's states, which the
    first pass reads, and the keys of a device's rows.
    """
    if work.head is None:
        return 0.0
    gathered = dataclasses.replace(mesh, fsdp=1)
    whole = _params_bytes(work.head, gathered)
    fuses = STATES * work.head.hidden_size**2 * DTYPE.itemsize
    places = min(work.context, PLACES)
    key = 2 * work.head.num_key_value_heads * work.head.head_dim * DTYPE.itemsize // mesh.tensor
    read = fuses + count * (whole - fuses + device_share(work, mesh).rows * places * key)
    found = [*_of_parameters(work.head, gathered), *_of_pass(work, mesh) * count]
    found = [x for x in found if spread(mesh, x.axes, 1)[0] > 1]
    waits = math.fsum(x.seconds(mesh, target) + x.latency(mesh, target) for x in found)
    return read / target.bandwidth + count * LAUNCHES * target.launch + waits


def _params_bytes(head: EagleConfig, mesh: MeshConfig) -> int:
    return device_bytes(abstract_eagle(head, abstract_mesh(mesh), DTYPE))


def _of_parameters(head: EagleConfig, gathered: MeshConfig) -> list[Collective]:
    """Matrices are gathered over `fsdp` once for a chain, to what devices of `gathered` have."""
    arrays = jax.tree.leaves(abstract_eagle(head, abstract_mesh(gathered), DTYPE))
    specs = jax.tree.leaves(eagle_specs(head), is_leaf=is_spec)
    return [
        Collective("all-gather", ("fsdp",), device_bytes(array))
        for array, spec in zip(arrays, specs, strict=True)
        if "embed" in spec.axes
    ]


def _of_pass(work: Work, mesh: MeshConfig) -> list[Collective]:
    """What a pass and its guess wait for.

    Over `tensor` the sums of embedding, attention and feed-forward, and the likeliest token's
    place. Devices that divide the rows have the keys of all, and gather new keys and values, their
    places and the tokens.
    """
    assert work.head is not None
    rows = device_share(work, mesh).rows
    axes = activation_axes(abstract_mesh(mesh), "batch", work.rows)
    hidden = rows * work.config.hidden_size * DTYPE.itemsize
    sums = Collective("all-reduce", ("tensor",), hidden, count=3)
    likeliest = 2 * mesh.tensor * rows * INDEX  # of each device's part of the vocabulary
    new = work.rows * work.head.num_key_value_heads * work.head.head_dim * DTYPE.itemsize
    return [
        sums,
        Collective("all-gather", ("tensor",), likeliest),
        Collective("all-gather", axes, new // mesh.tensor, count=2),
        Collective("all-gather", axes, work.rows * INDEX, count=2),
    ]
