"""The training loop: batches in, records of metrics out, a checkpoint at the end."""

import collections
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmoe.checkpoint import store
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.model.params import abstract_params
from jaxmoe.train.batches import TrainingData, training_data
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.evaluation import held_out_loss
from jaxmoe.train.loss import Loss, next_token_loss, picture_loss
from jaxmoe.train.optimizer import learning_rate, make_optimizer
from jaxmoe.train.partition import Trainable, everything, join, split, text_only
from jaxmoe.train.run_folder import RunFolder
from jaxmoe.train.state import SavedStates, TrainState, abstract_state, random_params, state_of

Record = dict[str, Any]
Batches = Callable[[int], Any]
Evaluate = Callable[[dict], Record]


def train(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    source: str = "the config",
    *,
    loss: Loss | None = None,
    batches: Batches | None = None,
    init: dict | str | Path | None = None,
    trainable: Trainable | None = None,
    evaluate: Evaluate | None = None,
    result: Callable[[dict], dict] | None = None,
) -> Iterator[Record]:
    """Trains, or goes on where a run of the same config was killed.

    In `config.output`: `checkpoint` at the end, `metrics.jsonl` with a record every `log_every`
    steps, `config.json`, and `states` to resume from. On the same devices a resumed run takes the
    same steps as one that was never killed, if it is given the same functions.

    Args:
        config: the run.
        mesh: the devices; the caller has set it with `jax.set_mesh`.
        source: what error messages call the config, usually its file.
        loss: `loss(model, params, batch) -> (scalar, metrics)`, which is compiled: the model's
            config, parameters in `config.dtype`, and a dict of arrays for the records, those that
            end in `loss` first. Default: `next_token_loss` as the config says.
        batches: `batches(step) -> batch`, a function of the step's number, from 0, and of nothing
            else, which resuming relies on. A batch is a tree of arrays; the first is its tokens.
            Default: rows of `config.data`.
        init: the parameters to begin with, on the mesh and more of them than the model's if `loss`
            wants that; or a checkpoint's folder. Default: `config.init`, or random ones.
        trainable: whether a parameter, by its dotted name such as `layers.3.attention.q`, is
            trained. The others stay as they are, and have no gradient and no optimizer state.
            Default: everything, but with the default `loss` no vision tower, which it does not run.
        evaluate: `evaluate(params) -> record`, every `evaluate_every` steps. Default: the held-out
            loss where `loss` and `batches` are the default.
        result: makes of all parameters those of the finished checkpoint, if they are not the same.

    Yields:
        Each record as it is written; nothing if the run was finished before.

    Raises:
        UserError: before anything is written, for a bad model or checkpoint, tokens that cannot be
            trained on, or an output that is not this run's; for a disk that fails; and at a step
            whose loss or gradient is not finite, with the state before it saved.
    """
    folder = RunFolder(config)
    if folder.is_finished():
        return
    model = _model(config, source)
    if batches is None:
        found = training_data(config, model)
        batches = found.batches
        if loss is None and evaluate is None:
            evaluate = functools.partial(_held_out, config, model, found)
        if loss is None and found.has_pictures:
            loss = picture_loss(config.router_loss, config.remat)
    trains_vision = getattr(loss, "trains_vision", False) and config.train_vision
    trainable = trainable or (everything if trains_vision else text_only)
    loss = loss or next_token_loss(config.router_loss, config.remat)
    optimizer = make_optimizer(config.optimizer, config.steps)
    shapes = init if isinstance(init, dict) else _shapes(model, mesh)
    trained, frozen = split(shapes, trainable)
    abstract = abstract_state(trained, optimizer, mesh)
    with folder.claimed():
        with SavedStates.open(folder.states) as states:
            start = states.newest(abstract)
            if start is None or jax.tree.leaves(frozen):
                trained, frozen = split(_first_params(config, model, mesh, init), trainable)
                start = start or state_of(trained, optimizer, mesh)
            folder.cut_back(int(start.step))
            step_fn = functools.partial(make_step(config, model, optimizer, loss), frozen)
            evaluation = functools.partial(_evaluated, evaluate, frozen)
            state = start
            for done, state, record in _steps(config, step_fn, batches, evaluation, start):
                if what := _not_finite(done, state, record):
                    states.save(state)
                    raise UserError(
                        f"{source}: {what} is not finite at step {done}; the state after step "
                        f"{state.step} is kept in {folder.states}, but the same config would fail "
                        "again: lower 'peak_lr', or look at the data."
                    )
                if record:
                    folder.append(record)
                    yield record
                if _every(config.save_every, done):
                    states.save(state)
        params = join(state.params, frozen)
        params = params if result is None else result(params)
        folder.finish(model, _cast(params, config.checkpoint_dtype))


def _steps(
    config: TrainConfig, step_fn: Callable, batches: Batches, evaluate: Evaluate, state: TrainState
) -> Iterator[tuple[int, TrainState, Record]]:
    """Each further step, the state after it, and a record; it is empty where none is due."""
    rate = learning_rate(config.optimizer, config.steps)
    tokens, start = 0, time.perf_counter()
    for number in range(int(state.step), config.steps):
        batch = batches(number)
        state, metrics, norm = step_fn(state, batch)
        tokens += jax.tree.leaves(batch)[0].size
        done, record = number + 1, {}
        if _every(config.log_every, done) or done == config.steps:
            record = _record(done, jax.device_get(metrics), float(norm), rate(number))
            record["tokens_per_second"] = round(tokens / (time.perf_counter() - start), 1)
        if _every(config.evaluate_every, done) or done == config.steps:
            record |= {"step": done} | evaluate(state.params)
        if record:
            tokens, start = 0, time.perf_counter()
        yield done, state, record


def make_step(
    config: TrainConfig, model: Llama4Config, optimizer: optax.GradientTransformation, loss: Loss
):
    """The compiled step: (frozen, state, batch) -> (state, metrics, gradient norm).

    Where the loss or the norm is not finite, the state stays what it was, its number of steps too.
    The state is donated: its memory becomes the new state's. `frozen` are the parameters that are
    not trained.
    """

    def total(trained: dict, frozen: dict, batch: Any):
        value, metrics = loss(model, _cast(join(trained, frozen), config.dtype), batch)
        return value, collections.OrderedDict(metrics)  # whose order compiled functions keep

    def run(frozen: dict, state: TrainState, batch: Any):
        gradients = jax.value_and_grad(total, has_aux=True)
        (value, metrics), gradient = gradients(state.params, frozen, batch)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = cast(dict, optax.apply_updates(state.params, updates))
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        after = TrainState(params, moments, state.step + 1)
        return jax.tree.map(functools.partial(jnp.where, finite), after, state), metrics, norm

    return jax.jit(run, donate_argnums=1)


def _cast(params: dict, dtype: str) -> dict:
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _evaluated(evaluate: Evaluate | None, frozen: dict, trained: dict) -> Record:
    return {} if evaluate is None else evaluate(join(trained, frozen))


def data_of(config: TrainConfig, source: str = "the config") -> TrainingData:
    """What `train` trains on if it is given no batches; arguments and errors are those of it."""
    return training_data(config, _model(config, source))


def _held_out(
    config: TrainConfig, model: Llama4Config, found: TrainingData, params: dict
) -> Record:
    return held_out_loss(config, model, params, batches=found.held_out())


def _record(step: int, metrics: dict, norm: float, rate: Any) -> Record:
    """The record of a step in plain numbers, its losses first."""
    plain = {name: _plain(np.asarray(value)) for name, value in metrics.items()}
    record = {"step": step} | {name: plain[name] for name in plain if name.endswith("loss")}
    return record | {"gradient_norm": norm, "learning_rate": float(rate)} | plain


def _plain(value: np.ndarray) -> Any:
    """A Python number, or a list of them with four decimals."""
    if value.ndim:
        return np.round(value, 4).tolist()
    return int(value) if value.dtype.kind in "iu" else float(value)


def _not_finite(step: int, state: TrainState, record: Record) -> str | None:
    """What is not finite, if anything; this waits for the step."""
    if int(state.step) < step:
        return "the loss or its gradient"
    numbers = {key: value for key, value in record.items() if isinstance(value, float)}
    return next((key for key, value in numbers.items() if not math.isfinite(value)), None)


def _model(config: TrainConfig, source: str) -> Llama4Config:
    """The model's config; also checks that the tokenizer exists and the matrices can be trained."""
    tokenizer = config.tokenizer
    if tokenizer and not any((Path(tokenizer) / name).exists() for name in store.COMPANIONS):
        raise UserError(f"{tokenizer} has none of the files {', '.join(store.COMPANIONS)}.")
    if config.init is None:
        as_json = json.loads(json.dumps(config.model))  # YAML has keys that are no text
        return from_hf(as_json, f"{source}, model")
    checkpoint = store.read_checkpoint(config.init)
    if checkpoint.formats:
        raise UserError(
            f"{config.init} has matrices in 8 or 4 bits, which cannot be trained; export it with "
            "--weights bf16 and convert that."
        )
    return checkpoint.config


def _shapes(model: Llama4Config, mesh: jax.sharding.Mesh) -> dict:
    """The model's own parameters as ShapeDtypeStructs on the mesh."""
    return abstract_params(model, mesh, jnp.float32, pads=False)


def _first_params(
    config: TrainConfig,
    model: Llama4Config,
    mesh: jax.sharding.Mesh,
    init: dict | str | Path | None,
) -> dict:
    """The parameters before the first step; the caller's own arrays are left to the caller."""
    if isinstance(init, dict):
        return jax.tree.map(jnp.copy, init)
    folder = config.init if init is None else str(init)
    if folder is None:
        return random_params(model, mesh, config.seed)
    return store.load(folder, mesh, "float32")[1]


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0
