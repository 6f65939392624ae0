"""The compiled step of training: gradients of one or several batches, and one update."""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxmoe.compilation import KEEP_ROUNDINGS
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.loss import Loss, targets_of
from jaxmoe.train.partition import join
from jaxmoe.train.router_losses import ASSIGNMENTS
from jaxmoe.train.selection_bias import moved
from jaxmoe.train.state import TrainState
from pallas_kernels.quantized import QuantizedMatrix

MOST_SKIPPED = 10  # steps in a row that may be skipped before the run ends
TARGETS = "targets"  # the metric that says how much a batch counts


class Outcome(NamedTuple):
    """What a step says of itself; its arrays are ready when the step is done.

    Attributes:
        metrics: of the loss.
        norm: of the gradient, before it is clipped.
        targets: how much the batches count, 1 each where the loss does not say.
        halted: whether no step is taken any more, this one included, since too many were not
            finite; the state stays the one before the last of them.
        skipped: how many steps were skipped so far.
    """

    metrics: dict[str, jax.Array]
    norm: Float[Array, ""]
    targets: Float[Array, ""]
    halted: Bool[Array, ""]
    skipped: jax.Array


class Found(NamedTuple):
    """What batches have in common with their parts: all but `targets` are means over targets.

    Attributes:
        gradient: of the loss, float32.
        loss: the scalar that the gradient is of.
        metrics: of the loss; those that are counts are sums.
        targets: how much the batches count.
    """

    gradient: dict
    loss: Float[Array, ""]
    metrics: dict[str, jax.Array]
    targets: Float[Array, ""]


def make_step(
    config: TrainConfig,
    model: Llama4Config,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    abstract: TrainState | None = None,
) -> Callable[..., tuple[TrainState, Outcome]]:
    """The compiled step: (frozen, state, batch) -> (state, outcome).

    Where the loss or the norm of its gradient is not finite, the parameters and moments stay what
    they were. The state is donated: its memory becomes the new state's. `frozen` are the parameters
    that are not trained. Where `config.accumulate` is N above 1, each array of the batch is N
    batches' [N, ...].

    Args:
        config, model, optimizer, loss: of the run.
        abstract: shapes and shardings of the state; default: those that it comes with.
    """
    patience = 1 if config.not_finite == "stop" else MOST_SKIPPED

    def run(frozen: dict, state: TrainState, batch: Any):
        before = state if abstract is None else _on_device(state, abstract)
        found = _found(config, model, loss, before.params, frozen, batch)
        norm = optax.tree.norm(found.gradient)
        finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
        if config.optimizer.name == "muon":  # else XLA decays weights before the forward pass
            before, finite = lax.optimization_barrier((before, finite))
        after = _updated(config, optimizer, before, found)
        state, halted = _counted(before, after, finite, patience)
        found.metrics.pop(ASSIGNMENTS, None)
        return state, Outcome(found.metrics, norm, found.targets, halted, state.skipped)

    layouts: dict[str, Any] = {}
    if abstract is not None:
        everywhere = NamedSharding(abstract.step.sharding.mesh, PartitionSpec())  # pyrefly: ignore
        layouts["out_shardings"] = (jax.tree.map(lambda x: x.sharding, abstract), everywhere)
    # The policy and its reference differ by what was learned, not by where a compiler rounds.
    options = None if config.preference is None else KEEP_ROUNDINGS
    return jax.jit(run, donate_argnums=1, compiler_options=options, **layouts)


def cast_all(params: dict, dtype: str) -> dict:
    """The parameters in another dtype; quantized matrices and integers stay as they are."""

    def cast_one(p: Any) -> Any:
        keeps = isinstance(p, QuantizedMatrix) or not jnp.issubdtype(p.dtype, jnp.floating)
        return p if keeps else p.astype(dtype)

    return jax.tree.map(cast_one, params, is_leaf=lambda p: isinstance(p, QuantizedMatrix))


def _on_device(state: TrainState, abstract: TrainState) -> TrainState:
    """The state with what is in the host's memory moved to the devices'."""

    def moved(x: jax.Array, like: Any) -> jax.Array:
        if like.sharding.memory_kind != "pinned_host":
            return x
        return jax.device_put(x, like.sharding.with_memory_kind("device"))

    return jax.tree.map(moved, state, abstract)


def _found(
    config: TrainConfig, model: Llama4Config, loss: Loss, trained: dict, frozen: dict, batch: Any
) -> Found:
    """The gradient and metrics of a step's batches, as if they were one."""
    # Cast before the loop over batches, which would otherwise keep float32 copies.
    trained, frozen = cast_all(trained, config.dtype), cast_all(frozen, config.dtype)

    def total(trained: dict, batch: Any):
        value, metrics = loss(model, join(trained, frozen), batch)
        found = collections.OrderedDict(metrics)  # whose order compiled functions keep
        if not config.selection_bias:
            found.pop(ASSIGNMENTS, None)
        return value, found

    def found(batch: Any) -> Found:
        (value, metrics), gradient = jax.value_and_grad(total, has_aux=True)(trained, batch)
        targets = jnp.asarray(metrics.get(TARGETS, 1.0), jnp.float32)
        return Found(cast_all(gradient, "float32"), value, metrics, targets)

    if config.accumulate == 1:
        return found(batch)

    def add(sums: Found, batch: Any):
        return jax.tree.map(jnp.add, sums, _scaled(found(batch), _weight)), None

    first = jax.tree.map(lambda x: x[0], batch)
    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda b: _scaled(found(b), _weight), first),
    )
    sums, _ = lax.scan(add, nothing, batch)
    return _scaled(sums, _share)


def _scaled(found: Found, scale: Callable[[jax.Array], jax.Array]) -> Found:
    """Means made into sums or the reverse; counts stay as they are.

    Args:
        found: what `loss/NAME` is in its metrics is a mean over `targets/NAME`, if they are there.
        scale: of a number of targets, what a mean over them is multiplied by.
    """

    def of_metric(name: str, x: jax.Array) -> jax.Array:
        if name.partition("/")[0] == TARGETS or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x * scale(targets_of(name, {**found.metrics, TARGETS: found.targets}))

    metrics = collections.OrderedDict(
        (name, of_metric(name, x)) for name, x in found.metrics.items()
    )
    factor = scale(found.targets)
    gradient = jax.tree.map(lambda g: factor * g, found.gradient)
    return Found(gradient, factor * found.loss, metrics, found.targets)


def _weight(targets: jax.Array) -> jax.Array:
    return targets


def _share(targets: jax.Array) -> jax.Array:
    return 1 / jnp.where(targets > 0, targets, 1.0)


def _updated(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    found: Found,
) -> tuple[dict, Any]:
    """Parameters and moments after a step; the optimizer sees all of them in float32.

    The gradient of selection biases is 0, so the optimizer leaves them where they are.
    """
    wide = cast_all(state.params, "float32")
    updates, moments = optimizer.update(found.gradient, state.optimizer, wide)
    params = cast(dict, optax.apply_updates(wide, updates))
    if config.selection_bias:
        if ASSIGNMENTS not in found.metrics:
            raise UserError(f"'selection_bias' needs a loss whose metrics have {ASSIGNMENTS!r}.")
        params = moved(params, found.metrics[ASSIGNMENTS], config.selection_bias)
    if config.params_dtype == "bfloat16":
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        params = structure.unflatten(map(rounded_at_random, leaves, keys))
    return params, moments


def rounded_at_random(x: Float[Array, "..."], key: jax.Array) -> Float[Array, "..."]:
    """Rounds float32 to one of the two nearest bfloat16, so that the mean is the number itself.

    What is between them is added to 16 random bits; a carry rounds up (away from zero).
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _counted(
    before: TrainState, after: tuple[dict, Any], finite: jax.Array, patience: int
) -> tuple[TrainState, jax.Array]:
    """The state after a step, and whether no step is taken any more.

    Args:
        before: the state before the step.
        after: parameters and moments, if the step is taken.
        finite: whether it can be.
        patience: so many steps in a row that are not finite end the run.
    """
    halted = before.in_a_row >= patience  # a step that was begun before the host knew
    in_a_row = jnp.where(halted, before.in_a_row, jnp.where(finite, 0, before.in_a_row + 1))
    halts = in_a_row >= patience
    taken = functools.partial(jnp.where, finite & ~halted)
    params, moments = jax.tree.map(taken, after, (before.params, before.optimizer))
    one, bad = (~halts).astype(jnp.int32), (~finite & ~halts).astype(jnp.int32)
    step, skipped = before.step + one, before.skipped + bad
    return TrainState(params, moments, step, skipped, in_a_row), halts
