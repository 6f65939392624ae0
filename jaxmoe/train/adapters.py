"""Adapters of a run: which matrices get one, of which rank, and what they begin as."""

import re
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax

from jaxmoe.checkpoint.peft import PeftAdapter, read_adapter
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.adapters import (
    Adapter,
    abstract_adapters,
    adaptable,
    init_adapters,
    shares_with,
    with_adapters,
)
from jaxmoe.train.config import AdapterConfig
from jaxmoe.train.partition import Trainable


class AdapterPlan(NamedTuple):
    """The adapters of a run.

    Attributes:
        ranks: by the parameters' dotted names.
        scales: likewise.
        opened: what they begin as; None for new ones.
    """

    ranks: dict[str, int]
    scales: dict[str, float]
    opened: PeftAdapter | None

    def abstract(self, model: Llama4Config, params: dict, mesh: jax.sharding.Mesh) -> dict:
        """Shapes of a model's parameters, with those of the adapters beside them.

        Raises:
            UserError: if the mesh does not divide a parameter.
        """
        found = abstract_adapters(model, mesh, self.ranks)
        return self._beside(model, params, found)

    def first(self, model: Llama4Config, params: dict, mesh: jax.sharding.Mesh, seed: int) -> dict:
        """A model's parameters with the adapters, float32, as they are before the first step."""
        if self.opened is not None:
            return self.opened.added_to(params, mesh, "float32")
        found = abstract_adapters(model, mesh, self.ranks)
        return self._beside(model, params, init_adapters(found, jax.random.key(seed)))

    def _beside(self, model: Llama4Config, params: dict, found: dict) -> dict:
        new = {name: Adapter(a, b, self.scales[name]) for name, (a, b) in found.items()}
        return with_adapters(model, params, new)


def adapter_plan(config: AdapterConfig, model: Llama4Config, source: str) -> AdapterPlan:
    """Which matrices get an adapter.

    Args:
        config: of the adapters.
        model: the model.
        source: what error messages call the run's config.

    Raises:
        UserError: if a pattern matches nothing, the experts' gate and up are told apart, or the
            adapter to begin with is none of this model's.
    """
    if config.init is not None:
        opened = read_adapter(config.init, model)
        scales = {param: one.scale for one in opened.found for param in one.target.params}
        return AdapterPlan(opened.ranks, scales, opened)
    names = list(adaptable(model))
    for pattern in (*config.targets, *config.ranks):
        if not any(fnmatchcase(name, pattern) for name in names):
            kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
            raise UserError(
                f"{source}, adapter: {pattern!r:.80} matches no matrix; there are "
                f"{', '.join(kinds)}."
            )
    ranks = {name: _rank(config, name) for name in names if _matches(name, config.targets)}
    for name in names:
        gate = shares_with(name)
        if gate is not None and ranks.get(name) != ranks.get(gate):
            raise UserError(
                f"{source}, adapter: {gate} and {name} are one matrix in PEFT's files; let the "
                "same patterns match both."
            )
    root = 0.5 if config.rslora else 1.0
    return AdapterPlan(ranks, {name: config.alpha / r**root for name, r in ranks.items()}, None)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _rank(config: AdapterConfig, name: str) -> int:
    others = (rank for pattern, rank in config.ranks.items() if fnmatchcase(name, pattern))
    return next(others, config.rank)


def adapters_among(trainable: Trainable) -> Trainable:
    """The predicate of the adapters whose parameters are `trainable`, and of nothing else."""

    def trains(name: str) -> bool:
        param, _, part = name.rpartition(".")
        return part in ("a", "b") and trainable(param)

    return trains
