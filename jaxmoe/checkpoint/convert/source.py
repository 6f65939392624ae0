"""Opens a published checkpoint in any format: its configuration, and which tensor lies where."""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.formats import compressed_tensors, params_json
from jaxmoe.checkpoint.formats.pth import PthFolder
from jaxmoe.checkpoint.formats.safetensors import SafetensorsFolder
from jaxmoe.checkpoint.formats.tensor_files import TensorFiles
from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.match import match
from jaxmoe.checkpoint.mapping.quantized import check_stated, find_formats
from jaxmoe.checkpoint.mapping.tensors import (
    BLOCK_BYTES,
    Block,
    Format,
    Group,
    array_shapes,
    expand,
    main_dtype,
)
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf, read_object, stated_dtype
from jaxmoe.model.params import ParamSpec, named_specs, num_params

CACHED = 2**16  # elements that two passes find in the processor's cache
MODELOPT = "hf_quant_config.json"  # ModelOpt's, beside a config.json that does not mention it
ADAPTER = "adapter_config.json"  # PEFT's
FIRST_NONFINITE = {  # bits of the smallest positive number that is not finite
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F32": 0x7F800000,
    "F8_E4M3": 0x7F,
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A published checkpoint whose tensors are all there and have the right shapes.

    Attributes:
        config: of the model; without vision if no tower is read.
        outer: the `config.json` around the text model's; None if no vision tower is read.
        formats: the formats of the quantized ones, by name.
        groups: which parameters lie in which tensors.
        files: the files with the tensors.
        stored_names: the name in the files of every tensor of the groups.
        left_out: the names in the files of the tensors that are not read.
        notes: sentences about what users may not expect.
        stated: the dtype that the configuration states, whatever it may be.
    """

    config: Llama4Config
    outer: dict[str, Any] | None
    formats: dict[str, Format]
    groups: list[Group]
    files: TensorFiles
    stored_names: dict[str, str]
    left_out: list[str]
    notes: tuple[str, ...] = ()
    stated: Any = None

    @functools.cached_property
    def specs(self) -> dict[str, ParamSpec]:
        """The declarations of the parameters, by name."""
        return named_specs(self.config)

    @property
    def main_dtype(self) -> str:
        """The dtype that the model as a whole counts as; see `tensors.main_dtype`."""
        nbytes: dict[str, int] = collections.Counter()
        for group in self.groups:
            if not group.params[0].endswith((".qvalue", ".scale")):
                dtype = self.dtype(group)
                nbytes[dtype.name] += len(group.params) * math.prod(group.shape) * dtype.itemsize
        return main_dtype(nbytes, self.stated)

    def dtype(self, group: Group) -> np.dtype:
        """The stored dtype of a group's tensors."""
        return self.files.dtype(self.stored_names[next(iter(group.tensors))])

    def read_block(self, group: Group, block: Block) -> list[np.ndarray]:
        """The slices of a group's parameters that one of its blocks holds.

        Raises:
            UserError: as `read`.
        """
        name = group.params[0].removesuffix(".qvalue")
        group_size = self.formats[name].group_size if group.layout.packed else 0
        data = self.read(block.tensor, block.start, block.count)
        return group.layout.split(data, block.shape, group_size)

    def read(self, tensor: str, start: int, count: int) -> np.ndarray:
        """Reads the elements `start` to `start + count` of a flat tensor.

        Raises:
            UserError: as `TensorFiles.read`, or if an element is NaN or infinite.
        """
        name = self.stored_names[tensor]
        data = self.files.read(name, start, count)
        entry = self.files.tensors[name]
        if _has_nonfinite(data, entry.dtype):
            values = data.astype(np.float32)
            first = int(np.argmin(np.isfinite(values)))
            place = ", ".join(str(i) for i in np.unravel_index(start + first, entry.shape))
            raise UserError(
                f"{entry.file} holds {name} with {values[first]} at [{place}], with which a model "
                "can compute nothing; download it again, or use another release."
            )
        return data


def _has_nonfinite(data: np.ndarray, dtype: str) -> bool:
    """Whether an array has a NaN or infinity.

    Compares bit patterns, which are ordered as the numbers are.

    Args:
        data: the array.
        dtype: the name of its dtype in the files.
    """
    first = FIRST_NONFINITE.get(dtype)
    if first is None:
        return False
    signed, unsigned = (data.view(f"{kind}{data.itemsize}") for kind in "iu")
    last = first + (1 << (8 * data.itemsize - 1))  # the same with the sign's bit
    return any(
        int(signed[i : i + CACHED].max()) >= first or int(unsigned[i : i + CACHED].max()) >= last
        for i in range(0, data.size, CACHED)
    )


def open_source(
    folder: str | Path, text_only: bool = False, ignore_unknown: bool = False
) -> Source:
    """Opens a folder in Hugging Face's or Meta's layout, and checks names, shapes and dtypes.

    Args:
        folder: the folder; only configurations and headers of files are read.
        text_only: leaves out the vision tower if there is one.
        ignore_unknown: ignores unknown keys of the configuration instead of refusing them.

    Raises:
        UserError: naming the first thing that is missing, unknown or contradictory.
    """
    folder = Path(folder)
    if any(folder.glob("consolidated.*.pth")):
        return _open_meta(folder, text_only, ignore_unknown)
    return _open_hf(folder, text_only, ignore_unknown)


def _open_hf(folder: Path, text_only: bool, ignore_unknown: bool) -> Source:
    notes = _adapter_notes(folder)
    mapping = read_object(folder, "config.json")
    origin = str(folder / "config.json")
    files = SafetensorsFolder(folder)
    config = _config(mapping, origin, ignore_unknown, files, text_only)
    _check_sizes(config, files, origin)
    stored_names = {name.removeprefix(names.TEXT_PREFIX): name for name in files.tensors}
    if _is_untied(config, stored_names, files):
        config = dataclasses.replace(config, tie_word_embeddings=False)
        notes += (
            f"{origin} ties lm_head to embed_tokens, but the files hold both with different "
            "numbers: both are kept, as transformers does.",
        )
    experts = names.UNFUSED if _is_unfused(stored_names) else names.FUSED
    rows = names.TEXT + experts + names.LAST
    kinds = _stated_kinds(mapping, folder, origin)
    formats, packing = find_formats(config, rows, stored_names, files, kinds)
    check_stated({kind.name for kind in kinds}, formats, origin)
    groups = expand(rows + names.VISION, array_shapes(config, formats), packing=packing)
    matched, left_out = match(config, groups, files, str(folder))
    return Source(
        config,
        _outer_config(config, mapping),
        formats,
        groups,
        files,
        matched,
        left_out,
        notes + _scale_notes(left_out),
        stated_dtype(mapping),
    )


def _scale_notes(left_out: list[str]) -> tuple[str, ...]:
    """What to tell the user about scales that are not read."""
    count = sum(map(names.is_other_scale, left_out))
    if not count:
        return ()
    return (
        f"{count} scales of activations, keys and values are left out: only matrices stay "
        "quantized, and jaxmoe generate --kv says how keys and values are stored when the model "
        "runs.",
    )


def _stated_kinds(
    mapping: Mapping[str, Any], folder: Path, origin: str
) -> set[compressed_tensors.Kind]:
    """How the configuration says that matrices are quantized; an empty set if it does not.

    Raises:
        UserError: as `compressed_tensors.kinds`, or if the matrices are quantized by ModelOpt.
    """
    kinds = compressed_tensors.kinds(mapping, origin)
    if not kinds and (folder / MODELOPT).exists():
        raise UserError(
            f"{folder / MODELOPT} says that the matrices are quantized by ModelOpt; only "
            f"{compressed_tensors.METHOD} can be read, so use another release."
        )
    return kinds


def _adapter_notes(folder: Path) -> tuple[str, ...]:
    """What to tell the user about a PEFT adapter in the folder; nothing if there is none.

    Raises:
        UserError: if the folder holds an adapter and no model.
    """
    if not (folder / ADAPTER).exists():
        return ()
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds an adapter and no model; merge it into its base model with PEFT's "
            "merge_and_unload, and use the result."
        )
    return (
        f"{folder} also holds an adapter ({ADAPTER}), which is not applied: to have it, merge it "
        "into the model with PEFT's merge_and_unload.",
    )


def _check_sizes(config: Llama4Config, files: TensorFiles, origin: str) -> None:
    """Refuses sizes far beyond what the files hold, before anything is allocated for them."""
    nbytes = sum(entry.nbytes for entry in files.tensors.values())
    layers, tensors = config.num_hidden_layers, len(files.tensors)
    if layers > tensors:
        what = f"{layers} layers, but {files.folder} holds {tensors} tensors"
    elif num_params(config) > 2 * nbytes:  # a parameter has 4 bits or more
        what = f"{num_params(config)} parameters, but {files.folder} holds {nbytes} bytes of them"
    else:
        return
    raise UserError(f"{origin} describes {what}; correct it or download the model again.")


def _is_untied(config: Llama4Config, stored_names: Mapping[str, str], files: TensorFiles) -> bool:
    """Whether the configuration ties embedding and head, but the files hold different numbers."""
    pair = [stored_names.get(f"{name}.weight") for name in ("model.embed_tokens", "lm_head")]
    if not config.tie_word_embeddings or None in pair:
        return False
    shape, other = (files.tensors[str(name)].shape for name in pair)
    if shape != other:
        return True
    size, step = math.prod(shape), BLOCK_BYTES // 4
    for start in range(0, size, step):
        count = min(step, size - start)
        one, two = (files.read(str(name), start, count).astype(np.float32) for name in pair)
        if not np.array_equal(one, two):
            return True
    return False


def _is_unfused(tensors: Iterable[str]) -> bool:
    return any(".experts.0." in name for name in tensors)


def _outer_config(config: Llama4Config, mapping: Mapping[str, Any]) -> dict[str, Any] | None:
    """A multimodal config.json without the parts on the text model and on quantization."""
    if config.vision is None:
        return None
    skipped = ("text_config", compressed_tensors.KEY)
    return {key: value for key, value in mapping.items() if key not in skipped}


def _config(
    mapping: Mapping[str, Any],
    origin: str,
    ignore_unknown: bool,
    files: TensorFiles,
    text_only: bool,
) -> Llama4Config:
    """The configuration of what is read of some files; without vision if they hold no tower.

    Raises:
        UserError: as `from_hf`, or if the files hold a tower that the configuration does not
            describe.
    """
    has_tower = not text_only and any(map(names.is_vision, files.tensors))
    config = from_hf(mapping, origin, ignore_unknown, text_only=not has_tower)
    if has_tower and config.vision is None:
        raise UserError(
            f"{origin} does not describe the vision tower that is there; correct it, or use "
            "--text-only."
        )
    return config


def _open_meta(folder: Path, text_only: bool, ignore_unknown: bool) -> Source:
    if (folder / "config.json").exists():
        mapping, origin = read_object(folder, "config.json"), str(folder / "config.json")
    else:
        origin = str(folder / "params.json")
        mapping = params_json.to_hf_mapping(read_object(folder, "params.json"), origin)
    files = PthFolder(folder)
    config = _config(mapping, origin, ignore_unknown, files, text_only)
    _check_sizes(config, files, origin)
    formats = _meta_formats(config, files)
    rows = names.META_TEXT + names.META_VISION
    try:
        groups = expand(rows, array_shapes(config, formats), ranks=files.ranks)
    except ValueError as error:
        raise UserError(f"{folder} contradicts {origin}: {error}; download both again.") from None
    matched, left_out = match(config, groups, files, str(folder))
    outer = _outer_config(config, mapping)
    return Source(config, outer, formats, groups, files, matched, left_out)


def _meta_formats(config: Llama4Config, files: PthFolder) -> dict[str, Format]:
    """The formats of fp8 experts, by parameter.

    Every output has a scale; in `down`, whose inputs are divided among the ranks, one per rank.
    """
    formats = {}
    for n in range(config.num_hidden_layers):
        entry = files.tensors.get(f"0:layers.{n}.feed_forward.experts.moe_w_in_eD_F")
        if entry is None or entry.dtype != "F8_E4M3":
            continue
        experts = f"layers.{n}.feed_forward.experts"
        for name in ("gate", "up"):
            formats[f"{experts}.{name}"] = Format("fp8", config.hidden_size)
        formats[f"{experts}.down"] = Format("fp8", config.intermediate_size // files.ranks)
    return formats
