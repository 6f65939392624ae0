"""Reads adapters that PEFT, or `write_adapter`, saved."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmoe.checkpoint.formats.safetensors import SafetensorsFolder
from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.peft.layout import (
    INNER,
    NEWER,
    OLDER,
    PREFIX,
    ExpertLayout,
    Factors,
    Target,
    layouts_of,
    targets,
    tensor_names,
    to_factors,
)
from jaxmoe.checkpoint.peft.settings import FILE, Settings, read_settings
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.adapters import Adapter, abstract_adapters, with_adapters

TENSORS = "adapter_model.safetensors"


class Found(NamedTuple):
    """One target's adapter in a file: the names of A and B, its rank and scale."""

    target: Target
    A: str
    B: str
    rank: int
    scale: float


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter's folder, opened: what it adapts is known, and no tensor is read.

    Attributes:
        folder: the folder.
        found: what it adapts.
        layout: how experts lie in it.
    """

    folder: Path
    found: tuple[Found, ...]
    layout: ExpertLayout
    _files: SafetensorsFolder
    _config: Llama4Config

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapted parameter, by dotted name."""
        return {param: one.rank for one in self.found for param in one.target.params}

    def factors(self, one: Found) -> Factors:
        """Reads one target's a [..., in, r] and b [..., r, out].

        Raises:
            UserError: if the file cannot be read, or a number in it is not finite.
        """
        A, B = map(self._tensor, (one.A, one.B))
        return to_factors(one.target, A, B, self.layout)

    def _tensor(self, name: str) -> np.ndarray:
        shape = self._files.tensors[name].shape
        data = self._files.read(name, 0, int(np.prod(shape))).reshape(shape)
        if not np.isfinite(data.astype(np.float32, copy=False)).all():
            raise UserError(f"{self.folder / TENSORS} holds numbers in {name} that are not finite.")
        return data

    def added_to(self, params: dict, mesh: jax.sharding.Mesh, dtype: Any) -> dict:
        """The parameters with the adapters beside them, on the mesh.

        Host memory holds one target's adapter at a time.

        Args:
            dtype: of the adapters; the model's.

        Raises:
            UserError: if the file cannot be read, or the mesh does not divide a parameter.
        """
        abstract = abstract_adapters(self._config, mesh, self.ranks, dtype)
        added: dict[str, Adapter] = {}
        for one in self.found:
            a, b = self.factors(one)
            parts = np.split(b, len(one.target.params), axis=-1)
            for param, part in zip(one.target.params, parts, strict=True):
                of_a, of_b = abstract[param]
                placed = None if of_a is None else place(a, of_a)
                added[param] = Adapter(placed, place(part, of_b), one.scale)
        return with_adapters(self._config, params, added)


def place(x: np.ndarray, where: jax.ShapeDtypeStruct) -> jax.Array:
    """An array in the dtype and sharding of `where`, which has its shape."""
    cast = x.astype(where.dtype)
    return jax.make_array_from_callback(where.shape, where.sharding, lambda index: cast[index])


def read_adapter(
    folder: str | Path, config: Llama4Config, *, text_only: bool = False
) -> PeftAdapter:
    """Opens a folder that PEFT saved, of either layout of experts.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        config: of the model that it adapts.
        text_only: passes over adapters of a vision tower.

    Raises:
        UserError: if a file is missing or damaged, the adapter is of another model, or it is
            anything but LoRA of the matrices of layers and tower.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    if not (folder / TENSORS).exists():
        raise UserError(f"{folder} holds no {TENSORS}; save the adapter as safetensors.")
    files = SafetensorsFolder(folder, TENSORS)
    modules = _modules(folder, files, text_only)
    keys = {_plain(target.key): target for target in targets(config)}
    found = []
    for module in modules:
        key = _key(folder, module, modules, settings)
        if _plain(key) not in keys:
            raise UserError(
                f"{folder} adapts {key}, which is no matrix of this model's layers; is it the "
                "adapter of another model?"
            )
        found.append(_found(folder, files, keys[_plain(key)], module, key, settings))
    if not found:
        raise UserError(f"{folder} adapts nothing.")
    return PeftAdapter(folder, tuple(found), _layout(folder, files, found, settings), files, config)


def adapter_digest(folder: str | Path) -> str:
    """A SHA-256 of an adapter's files, which were opened before."""
    digest = hashlib.sha256((Path(folder) / FILE).read_bytes())
    with open(Path(folder) / TENSORS, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _plain(key: str) -> str:
    """A name without the prefix that text models have beside a tower."""
    return key.removeprefix(names.TEXT_PREFIX)


def _modules(folder: Path, files: SafetensorsFolder, text_only: bool) -> list[str]:
    """The modules whose A and B a file holds."""
    modules = dict.fromkeys(_module(folder, name) for name in files.tensors)
    for module in modules:
        for name in tensor_names(module):
            if name not in files.tensors:
                raise UserError(f"{folder / TENSORS} lacks {name}; save the adapter again.")
    return [module for module in modules if not (text_only and names.is_vision(module))]


def _module(folder: Path, tensor: str) -> str:
    for end in (".lora_A.weight", ".lora_B.weight"):
        if tensor.startswith(PREFIX) and tensor.endswith(end):
            return tensor.removeprefix(PREFIX).removesuffix(end)
    raise UserError(
        f"{folder / TENSORS} holds {tensor!r:.200}, which is no LoRA of a matrix; only these are "
        "read."
    )


def _key(folder: Path, module: str, modules: Iterable[str], settings: Settings) -> str:
    """The name of the matrix that a module of the file adapts.

    Raises:
        UserError: if it is one tensor of experts, and the settings do not say which.
    """
    if module.endswith(f".experts{INNER}"):
        return f"{module.removesuffix(INNER)}.gate_up_proj"
    if not module.endswith(".experts"):
        return module
    if module + INNER in modules:
        return f"{module}.down_proj"
    either = [f"{module}.{x}" for x in ("gate_up_proj", "down_proj")]
    asked = [key for key in either if any(f".{key}".endswith(f".{p}") for p in settings.parameters)]
    if len(asked) != 1:
        raise UserError(
            f"{folder / FILE} does not say which tensor of {module} is adapted; name one of "
            f"{' and '.join(either)} in target_parameters."
        )
    return asked[0]


def _found(
    folder: Path, files: SafetensorsFolder, target: Target, module: str, key: str, settings
) -> Found:
    """What a module adapts, its shapes checked.

    Raises:
        UserError: if they are those of no adapter of the target.
    """
    A, B = tensor_names(module)
    shapes = a_shape, b_shape = files.tensors[A].shape, files.tensors[B].shape
    fits = len(a_shape) == len(b_shape) == 2 and a_shape[0] == b_shape[1] > 0
    fits = fits and a_shape[0] % (target.experts or 1) == 0
    layouts = list(layouts_of(target, a_shape[-1], b_shape[0])) if fits else []
    if not layouts or (target.experts is None and OLDER not in layouts):
        raise UserError(
            f"{folder / TENSORS} holds {A} and lora_B of shapes {shapes[0]} and {shapes[1]}, which "
            f"do not adapt {target.inputs} inputs and {target.outputs} outputs; is it the adapter "
            "of another model?"
        )
    rank = a_shape[0] // (target.experts or 1)
    return Found(target, A, B, rank, settings.scale(key, rank))


def _layout(folder: Path, files: SafetensorsFolder, found, settings: Settings) -> ExpertLayout:
    """The layout of the experts: the widths decide, or else PEFT's version.

    Raises:
        UserError: if nothing does.
    """
    possible = {OLDER, NEWER}
    for one in found:
        if one.target.experts is not None:
            a_width, b_width = files.tensors[one.A].shape[1], files.tensors[one.B].shape[0]
            possible &= set(layouts_of(one.target, a_width, b_width))
    if len(possible) == 1:
        return possible.pop()  # pyrefly: ignore  # one of the literals
    if any(one.target.experts for one in found):
        if not possible or settings.version is None:
            raise UserError(
                f"{folder} holds experts whose widths fit both layouts of PEFT; give its "
                f"peft_version in {FILE}."
            )
        return OLDER if settings.version < (0, 19) else NEWER
    return NEWER
