"""Several adapters beside one model, of which each request chooses one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmoe.checkpoint.peft.layout import Target
from jaxmoe.checkpoint.peft.reader import Found, PeftAdapter, place, read_adapter
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.adapters import Adapters, abstract_adapters, with_adapters


def read_adapters(
    folders: Mapping[str, str | Path], config: Llama4Config, *, text_only: bool = False
) -> dict[str, PeftAdapter]:
    """Opens several adapters of one model; arguments as for `read_adapter`.

    Args:
        folders: by the names that requests choose them by.

    Raises:
        UserError: as `read_adapter`, for a name that is empty, or if an adapter changes the vision
            tower, whose features all requests share.
    """
    read = {}
    for name, folder in folders.items():
        if not isinstance(name, str) or not name:
            raise UserError(f"the adapter {str(folder)!r:.200} has the name {name!r}; give text.")
        read[name] = read_adapter(folder, config, text_only=text_only)
        for one in read[name].found:
            if one.target.params[0].startswith("vision."):
                raise UserError(
                    f"the adapter {name!r:.80} changes {one.target.params[0]}, and all requests "
                    "share one vision tower; load it as the only adapter, without a name."
                )
    return read


def add_adapters(
    config: Llama4Config,
    adapters: Mapping[str, PeftAdapter],
    params: dict,
    mesh: jax.sharding.Mesh,
    dtype: Any,
) -> dict:
    """The parameters with several adapters beside them, on the mesh.

    Host memory holds the adapters of one target at a time.

    Args:
        config: of the model.
        adapters: by name.
        dtype: of the adapters; the model's.

    Raises:
        UserError: if a file cannot be read, or the mesh does not divide a parameter.
    """
    found: dict[Target, dict[str, Found]] = {}
    for name, adapter in adapters.items():
        for one in adapter.found:
            found.setdefault(one.target, {})[name] = one
    ranks = {
        param: sum(one.rank for one in of_target.values())
        for target, of_target in found.items()
        for param in target.params
    }
    abstract = abstract_adapters(config, mesh, ranks, dtype)
    added: dict[str, Adapters] = {}
    for target, of_target in found.items():
        factors = [adapters[name].factors(one) for name, one in of_target.items()]
        a = np.concatenate([a for a, _ in factors], axis=-1)
        b = np.concatenate([b for _, b in factors], axis=-2)
        has = [of_target.get(name) for name in adapters]
        of_each = tuple(one.rank if one else 0 for one in has)
        scales = tuple(one.scale if one else 0.0 for one in has)
        parts = np.split(b, len(target.params), axis=-1)
        for param, part in zip(target.params, parts, strict=True):
            of_a, of_b = abstract[param]
            placed = None if of_a is None else place(a, of_a)
            added[param] = Adapters(placed, place(part, of_b), tuple(adapters), of_each, scales)
    return with_adapters(config, params, added)
