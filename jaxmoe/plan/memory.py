"""Computes a step's memory on one device by formula, and the largest context that fits."""

import dataclasses

from jaxmoe.mesh import MeshConfig
from jaxmoe.plan.backward import training_temporaries
from jaxmoe.plan.head import head_bytes
from jaxmoe.plan.targets import Target
from jaxmoe.plan.temporaries import temporaries
from jaxmoe.plan.training import nbytes, state_of
from jaxmoe.plan.vision import features_bytes, tower_temporaries, training_bytes
from jaxmoe.plan.work import Work, cache_bytes, weight_bytes

INDEX = 4  # bytes of a token's id, of its position, and of its segment id
STEP = 1024  # tokens: contexts are searched in multiples of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by use.

    Attributes:
        weights: the parameters, in training those that are trained as the run stores them.
        cache: keys, values, scales, page tables and coordinates of the KV cache.
        optimizer: the optimizer's statistics, in training only.
        features: the table of images' features.
        head: parameters, keys and values of a head that drafts.
        gradients: of what is trained, and its copies in the dtype of computation.
        activations: what the forward pass of training keeps for the backward pass.
        temporaries: the new tokens, and everything else that is allocated only during a step.
    """

    weights: int
    cache: int = 0
    optimizer: int = 0
    features: int = 0
    head: int = 0
    gradients: int = 0
    activations: int = 0
    temporaries: int

    @property
    def peak(self) -> int:
        """The sum of all uses."""
        return sum(dataclasses.astuple(self))


def memory(work: Work, mesh: MeshConfig, target: Target | None = None) -> Memory:
    """The memory that one step of the work takes on one device of the mesh.

    Args:
        work: the step.
        mesh: the devices.
        target: what they are; None for H100s, whose temporaries are also those of other targets,
            except of TPUs in training.
    """
    new = 3 * work.rows * work.tokens * INDEX
    if work.trains:
        state, needs = state_of(work), training_temporaries(work, mesh, target)
        return Memory(
            weights=nbytes(state.frozen, mesh) + nbytes(state.trained, mesh),
            optimizer=nbytes(state.optimizer, mesh),
            gradients=needs.gradients,
            activations=needs.activations,
            temporaries=new + needs.phase + training_bytes(work, mesh),
        )
    return Memory(
        weights=weight_bytes(work, mesh),
        cache=cache_bytes(work, mesh),
        features=features_bytes(work),
        head=head_bytes(work, mesh),
        temporaries=new + max(temporaries(work, mesh), tower_temporaries(work, mesh)),
    )


def largest_context(work: Work, mesh: MeshConfig, target: Target) -> int:
    """The largest context of each row that fits, a multiple of `STEP`; 0 if `STEP` does not fit."""
    most = work.config.max_position_embeddings
    low, high = 1, -(-most // STEP)
    first, last = (peak_at(work, mesh, target, min(most, steps * STEP)) for steps in (low, high))
    if last <= target.limit:
        return most
    if first > target.limit:
        return 0
    while high - low > 1:  # interpolation search: memory is almost linear in the context
        guess = low + int((target.limit - first) / (last - first) * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        peak = peak_at(work, mesh, target, guess * STEP)
        if peak <= target.limit:
            low, first = guess, peak
        else:
            high, last = guess, peak
    return low * STEP


def peak_at(work: Work, mesh: MeshConfig, target: Target, context: int) -> int:
    """Peak bytes of the work with its context replaced by `context`."""
    return memory(dataclasses.replace(work, context=context), mesh, target).peak
