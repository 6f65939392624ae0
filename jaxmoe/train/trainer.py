"""`train`: a run from its first files to its finished checkpoint."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmoe.checkpoint import store
from jaxmoe.config import Llama4Config
from jaxmoe.errors import Stopped, UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.model.params import abstract_params, param_specs
from jaxmoe.train.adapters import AdapterPlan, adapter_plan, adapters_among
from jaxmoe.train.batches import TrainingData, training_data
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.eagle import (
    HeadPlan,
    head_of,
    head_plan,
    held_out_head_loss,
    is_head_param,
    refuse_pictures,
)
from jaxmoe.train.evaluation import held_out_loss
from jaxmoe.train.logs import log_package, open_log
from jaxmoe.train.loop import Batches, Evaluate, Loop, Taken, every
from jaxmoe.train.loss import Loss, next_token_loss, picture_loss
from jaxmoe.train.metrics import Meter, Record
from jaxmoe.train.optimizer import make_optimizer
from jaxmoe.train.partition import (
    Trainable,
    all_but,
    dotted,
    everything,
    join,
    split,
    text_only,
)
from jaxmoe.train.preferences import preference_loss
from jaxmoe.train.references import SavedReferences, preference_run
from jaxmoe.train.run_folder import RunFolder
from jaxmoe.train.selection_bias import abstract_biases, check_moves, model_of, with_biases
from jaxmoe.train.state import SavedStates, TrainState, abstract_state, random_params, state_of
from jaxmoe.train.step import cast_all, make_step
from pallas_kernels.quantized import QuantizedMatrix


def never() -> bool:
    """The `stop` of a run that nothing ends early."""
    return False


LOSS_OPTIONS = ("router_loss", "remat", "router_z_loss", "z_loss")  # fields that losses take


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
    data: TrainingData | None = None,
    result: Callable[[dict], dict] | None = None,
    stop: Callable[[], bool] = never,
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
        batches: `batches(n) -> batch`, a function of the batch's number, from 0, and of nothing
            else, which resuming relies on; a step takes `config.accumulate` of them. A batch is a
            tree of arrays; the first is its tokens. All processes make the same batch. Default:
            rows of `config.data`.
        init: the parameters to begin with, on the mesh and more of them than the model's if `loss`
            wants that; or a checkpoint's folder. Default: `config.init`, or random ones.
        trainable: whether a parameter, by its dotted name such as `layers.3.attention.q`, is
            trained. The others stay as they are, and have no gradient and no optimizer state.
            Default: everything, but with the default `loss` no vision tower, which it does not run.
            With `config.adapter`, the parameters whose adapters are trained.
            What `config.frozen` names is not trained in any case.
        evaluate: `evaluate(params) -> record`, every `evaluate_every` steps. Default: the held-out
            loss where `loss` and `batches` are the default.
        data: what `data_of` returned, where it was called before.
        result: makes of all parameters those of the finished checkpoint, if they are not the same;
            not with `config.adapter` or `config.head`.
        stop: asked once after each step whether to end early, as a signal may want; on several
            processes it says the same on all, as `jaxmoe.cli.signals.asked_to_stop` does.

    Yields:
        Each record as it is written; nothing if the run was finished before.

    Raises:
        UserError: before anything is written, for a bad model or checkpoint, tokens that cannot be
            trained on, or an output that is not this run's; for a disk that fails; and at a step
            whose loss or gradient is not finite, with the state before it saved; with
            `not_finite: skip` at the tenth in a row.
        Stopped: after the step at which `stop` said so, with the state saved.
    """
    if result is not None and config.result != "checkpoint":
        raise ValueError("a run with adapters or a head writes these, and makes no other result.")
    folder = RunFolder(config)
    if folder.is_finished():
        return
    package = log_package(config.log_to)
    model = _model(config, source)
    setup = set_up(config, model, mesh, source, loss, batches, init, trainable, evaluate, data)
    with folder.claimed(), open_log(config, package) as log:
        with SavedStates.open(folder.states) as states:
            state, frozen = setup.begin(states)
            folder.cut_back(int(state.step))
            finished = functools.partial(_finished, config, result, frozen)
            for taken in setup.loop(frozen, stop).steps(state):
                state = taken.state
                if taken.record:
                    if config.keep == "best" and folder.is_best(taken.record):
                        folder.keep_best(setup.model, finished(state))
                    folder.append(taken.record)
                    log(taken.record)
                    yield taken.record
                _save(config, source, folder, states, taken)
        folder.finish(setup.model, finished(state))


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run before its first step: its functions, and what its state is like.

    Attributes:
        config, mesh, loss, batches, init, trainable, evaluate: as for `train`, with the defaults.
        model: the model's config.
        plan: of the adapters; None for a run without.
        optimizer: of the run.
        abstract: shapes and shardings of the state.
        frozen: those of the parameters that are not trained.
        references: the reference's log-probabilities, of a run on pairs that begins with it.
        head: of a run that trains one.
    """

    config: TrainConfig
    mesh: jax.sharding.Mesh
    loss: Loss
    batches: Batches
    init: dict | str | Path | None
    trainable: Trainable
    evaluate: Evaluate | None
    model: Llama4Config
    plan: AdapterPlan | None
    optimizer: optax.GradientTransformation
    abstract: TrainState
    frozen: dict
    references: SavedReferences | None
    head: HeadPlan | None = None

    def begin(self, states: SavedStates) -> tuple[TrainState, dict]:
        """The state to go on from, and the parameters that are not trained."""
        config, state = self.config, states.newest(self.abstract)
        first = functools.cache(self._first_params)
        if self.references is not None:
            self.references.fill(first, begun=state is not None)
        if state is not None and not jax.tree.leaves(self.frozen):
            return state, self.frozen
        trained, frozen = split(first(), self.trainable)
        return state or state_of(trained, self.optimizer, self.mesh, **_storage(config)), frozen

    def _first_params(self) -> dict:
        params = _first_params(self.config, self.model, self.mesh, self.init)
        params = with_biases(self.model, params, self.mesh)
        if self.head is not None:
            return self.head.first(params, self.mesh, self.config.seed)
        if self.plan is None:
            return params
        return self.plan.first(self.model, params, self.mesh, self.config.seed)

    def loop(self, frozen: dict, stop: Callable[[], bool]) -> Loop:
        """The steps of the run."""
        step_fn = make_step(self.config, self.model, self.optimizer, self.loss, self.abstract)

        def evaluated(trained: dict) -> Record:
            return {} if self.evaluate is None else self.evaluate(join(trained, frozen))

        meter = Meter(None if self.head else self.model, self.trainable, self.mesh)
        step_fn = functools.partial(step_fn, frozen)
        return Loop(self.config, step_fn, self.batches, meter, stop, evaluated)


def set_up(
    config: TrainConfig,
    model: Llama4Config,
    mesh: jax.sharding.Mesh,
    source: str,
    loss: Loss | None = None,
    batches: Batches | None = None,
    init: dict | str | Path | None = None,
    trainable: Trainable | None = None,
    evaluate: Evaluate | None = None,
    data: TrainingData | None = None,
) -> Setup:
    """Puts the defaults of `train` in place of what is None, and checks the rest.

    Writes nothing but tokens of the data. `init` may be shapes, for a step that is only compiled.
    """
    references, shows, found, model = None, False, None, model_of(config, model)
    check_names(config, model, source)
    if config.preference is not None:
        loss = loss or preference_loss(config.preference, **_loss_options(config))
    if batches is None:
        found = data or training_data(config, model)
        batches, shows = found.batches, found.has_pictures
        if config.preference is not None and loss is not None:
            batches, judge, references = preference_run(config, model, mesh, found, loss)
            evaluate = evaluate or judge
        elif config.head is not None:
            refuse_pictures(shows)
        elif loss is None:
            evaluate = evaluate or functools.partial(_held_out, config, model, found)
            loss = picture_loss(**_loss_options(config)) if shows else None
    head = head_plan(config, model, batches)
    if head is not None:
        loss, trainable = loss or head.loss(), trainable or is_head_param
        if found is not None:
            judge = functools.partial(held_out_head_loss, model, loss, found.held_out, config.dtype)
            evaluate = evaluate or judge
    trains_vision = getattr(loss, "trains_vision", config.preference is not None and shows)
    trains_vision = trains_vision and config.train_vision
    trainable = trainable or (everything if trains_vision else text_only)
    loss = loss or next_token_loss(**_loss_options(config))
    optimizer = make_optimizer(config.optimizer, config.steps)
    shapes = init if isinstance(init, dict) else _shapes(config, model, mesh, init)
    shapes = abstract_biases(model, shapes, mesh)
    shapes = shapes if head is None else head.abstract(shapes, mesh)
    trainable, plan = all_but(config.frozen, trainable, shapes), None
    if config.adapter is not None:
        plan, trainable = adapter_plan(config.adapter, model, source), adapters_among(trainable)
        shapes = plan.abstract(model, shapes, mesh)
    trained, frozen = split(shapes, trainable)
    _check_trained(trained, source)
    check_moves(config, trained, source)
    abstract = abstract_state(trained, optimizer, mesh, **_storage(config))
    functions = loss, batches, init, trainable, evaluate
    rest = optimizer, abstract, frozen, references, head
    return Setup(config, mesh, *functions, model, plan, *rest)


def _storage(config: TrainConfig) -> dict[str, Any]:
    """How a run's state is stored, as arguments of `abstract_state`."""
    return {"dtype": config.params_dtype, "offload": config.optimizer.offload}


def _save(
    config: TrainConfig, source: str, folder: RunFolder, states: SavedStates, taken: Taken
) -> None:
    """Saves the state after a step where it is due, and ends the run where the step says so.

    Raises:
        UserError: if something is not finite.
        Stopped: if the run is to end early.
    """
    state = taken.state
    if taken.not_finite:
        states.save(state._replace(in_a_row=jnp.zeros_like(state.in_a_row)))
        raise UserError(
            f"{source}: {taken.not_finite} is not finite at step {taken.done}; the state after "
            f"step {state.step} is kept in {folder.states}, but the same config would fail "
            "again: lower 'peak_lr', or look at the data."
        )
    if every(config.save_every, taken.done) or taken.stopped:
        states.save(state)
    if taken.stopped:
        raise Stopped(f"the state after step {state.step} is kept in {folder.states}; run again.")


def _loss_options(config: TrainConfig) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in LOSS_OPTIONS}
    names = config.data.source_names if config.data is not None else ()
    return options | {"sources": names}


def data_of(config: TrainConfig, source: str = "the config") -> TrainingData:
    """What `train` trains on if it is given no batches.

    Args:
        config, source: as for `train`.

    Raises:
        UserError: as `train`, for what concerns the data.
    """
    model = model_of(config, _model(config, source))
    check_names(config, model, source)
    return training_data(config, model)


def check_names(config: TrainConfig, model: Llama4Config, source: str) -> None:
    """Raises a UserError if the config names parameters that are not there, before data is read."""
    all_but(config.frozen, everything, param_specs(model))
    if config.adapter is not None:
        adapter_plan(config.adapter, model, source)


def _held_out(
    config: TrainConfig, model: Llama4Config, found: TrainingData, params: dict
) -> Record:
    return held_out_loss(config, model, params, batches=found.held_out())


def _model(config: TrainConfig, source: str) -> Llama4Config:
    """The model's config; also checks that the tokenizer exists and the matrices can be trained."""
    tokenizer = config.tokenizer
    if tokenizer and not any((Path(tokenizer) / name).exists() for name in store.COMPANIONS):
        raise UserError(f"{tokenizer} has none of the files {', '.join(store.COMPANIONS)}.")
    if config.init is None:
        as_json = json.loads(json.dumps(config.model))  # YAML has keys that are no text
        return from_hf(as_json, f"{source}, model")
    return store.read_checkpoint(config.init).config


def _shapes(
    config: TrainConfig, model: Llama4Config, mesh: jax.sharding.Mesh, init: str | Path | None
) -> dict:
    """The model's own parameters as ShapeDtypeStructs on the mesh, as they are stored."""
    shapes = abstract_params(model, mesh, jnp.float32, pads=False)
    folder = config.init if init is None else init
    return shapes if folder is None else store.abstract(folder, mesh)[1]


def _check_trained(trained: dict, source: str) -> None:
    """Refuses to train nothing, or matrices in 8 or 4 bits."""
    if not jax.tree.leaves(trained):
        raise UserError(f"{source} trains nothing; let its adapter or `trainable` name something.")
    leaves = jax.tree.leaves_with_path(trained, is_leaf=lambda w: isinstance(w, QuantizedMatrix))
    for path, w in leaves:
        if isinstance(w, QuantizedMatrix) and jax.tree.leaves(w):
            raise UserError(
                f"{source} trains {dotted(path)}, which `init` has in {w.format}; train an adapter "
                "instead, or export it with --weights bf16 and convert that."
            )


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
    if folder is None:  # a seed draws the same weights with and without biases
        return random_params(dataclasses.replace(model, selection_bias=False), mesh, config.seed)
    return store.load(folder, mesh)[1]


def _finished(
    config: TrainConfig, result: Callable[[dict], dict] | None, frozen: dict, state: TrainState
) -> dict:
    """The parameters of a checkpoint of this state; of adapters or a head, these alone."""
    if config.adapter is not None:
        return cast_all(state.params, config.checkpoint_dtype)
    params = join(state.params, frozen)
    result = head_of if config.head is not None else result
    return cast_all(params if result is None else result(params), config.checkpoint_dtype)
