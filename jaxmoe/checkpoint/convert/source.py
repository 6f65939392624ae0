"""A model in the files of others, whatever the format: its configuration, and what lies where."""

import collections
import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.formats import compressed_tensors, params_json
from jaxmoe.checkpoint.formats.pth import PthFolder
from jaxmoe.checkpoint.formats.safetensors import SafetensorsFolder, TensorFiles
from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.match import match
from jaxmoe.checkpoint.mapping.names import Row
from jaxmoe.checkpoint.mapping.tensors import (
    BLOCK_BYTES,
    Format,
    Group,
    array_shapes,
    expand,
    main_dtype,
)
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf, read_object, stated_dtype, vision_from_hf
from jaxmoe.model.params import ParamSpec, named_specs, num_params
from jaxmoe.model.vision_params import vision_specs

CACHED = 2**16  # elements that are looked at twice, and so should be in the processor's cache
MODELOPT = "hf_quant_config.json"  # beside a config.json that says nothing of it
ADAPTER = "adapter_config.json"  # of PEFT
FIRST_NONFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F8_E4M3": 0x7F}  # above 0
QUANTIZED = {"F8_E4M3": "fp8", "I8": "int8"}  # by dtype of an unpacked matrix that has scales


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint of another format, checked: all tensors are there, in the right shapes.

    Attributes:
        config: of the text model.
        outer: the config.json around the text model's; None if only that is read.
        specs: of all parameters that are read, by name.
        formats: of those that are quantized.
        groups: which parameters lie in which tensors.
        files: that hold the tensors.
        in_files: the name in the files of every tensor of the groups.
        left_out: names in the files of what is not read.
        notes: sentences about what a user may not expect.
        stated: the dtype that its configuration states.
    """

    config: Llama4Config
    outer: dict[str, Any] | None
    specs: dict[str, ParamSpec]
    formats: dict[str, Format]
    groups: list[Group]
    files: TensorFiles
    in_files: dict[str, str]
    left_out: list[str]
    notes: tuple[str, ...] = ()
    stated: Any = None

    @property
    def main_dtype(self) -> str:
        """What the model as a whole is in; see `tensors.main_dtype`."""
        nbytes: dict[str, int] = collections.Counter()
        for group in self.groups:
            if not group.ours[0].endswith((".qvalue", ".scale")):
                dtype = self.dtype(group)
                nbytes[dtype.name] += len(group.ours) * math.prod(group.shape) * dtype.itemsize
        return main_dtype(nbytes, self.stated)

    def dtype(self, group: Group) -> np.dtype:
        """The stored dtype of a group's tensors."""
        return self.files.dtype(self.in_files[group.pieces[0].tensor])

    def read(self, tensor: str, start: int, count: int) -> np.ndarray:
        """Elements of a flat tensor.

        Raises:
            UserError: as `TensorFiles.read`, or if one is no number or infinite.
        """
        name = self.in_files[tensor]
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
    """Whether there is a NaN or infinity: by bit patterns, which order as the numbers do."""
    first = FIRST_NONFINITE.get(dtype)
    if first is None:
        return False
    signed, unsigned = (data.view(f"{kind}{data.itemsize}") for kind in "iu")
    last = first + (1 << (8 * data.itemsize - 1))  # the same below 0
    return any(
        int(signed[i : i + CACHED].max()) >= first or int(unsigned[i : i + CACHED].max()) >= last
        for i in range(0, data.size, CACHED)
    )


def open_source(
    folder: str | Path, text_only: bool = False, ignore_unknown: bool = False
) -> Source:
    """Finds out the format of a folder, reads headers, and checks names and shapes.

    Args:
        text_only: leaves out the vision tower if there is one.
        ignore_unknown: takes the model as it is without the keys of its configuration that are not
            known.

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
    config = from_hf(mapping, origin, ignore_unknown)
    files = SafetensorsFolder(folder)
    _check_sizes(config, files, origin)
    plain = {name.removeprefix(names.TEXT_PREFIX): name for name in files.tensors}
    if _is_untied(config, plain, files):
        config = dataclasses.replace(config, tie_word_embeddings=False)
        notes += (
            f"{origin} ties lm_head to embed_tokens, but the files hold both with different "
            "numbers: both are kept, as transformers does.",
        )
    rows = names.TEXT + (names.UNFUSED if _is_unfused(plain) else names.FUSED) + names.LAST
    says = _says(mapping, folder, origin)
    formats, packed, repeats = _quantized(config, rows, plain, files, says)
    _check_says({kind.name for kind in says}, formats, origin)
    vision = None if text_only else _vision_specs(config, mapping, origin, files)
    specs = named_specs(config) | (vision or {})
    shapes = array_shapes(config, formats, specs)
    groups = expand(rows + names.VISION, shapes, packed=packed, repeats=repeats)
    in_files, left_out = match(config, groups, files, str(folder), vision is not None)
    notes += _scale_notes(left_out)
    stated = stated_dtype(mapping)
    outer = _around(mapping) if vision is not None else None
    return Source(config, outer, specs, formats, groups, files, in_files, left_out, notes, stated)


def _scale_notes(left_out: list[str]) -> tuple[str, ...]:
    count = sum(map(names.is_other_scale, left_out))
    if not count:
        return ()
    return (
        f"{count} scales of activations, keys and values are left out: only matrices stay "
        "quantized, and jaxmoe generate --kv says how keys and values are stored when the model "
        "runs.",
    )


def _says(mapping: Mapping[str, Any], folder: Path, origin: str) -> set[compressed_tensors.Kind]:
    """How the configuration says that matrices are quantized.

    Raises:
        UserError: as `compressed_tensors.kinds`, or if the matrices are quantized by ModelOpt.
    """
    says = compressed_tensors.kinds(mapping, origin)
    if not says and (folder / MODELOPT).exists():
        raise UserError(
            f"{folder / MODELOPT} says that the matrices are quantized by ModelOpt; only "
            f"{compressed_tensors.METHOD} can be read, so use another release."
        )
    return says


def _adapter_notes(folder: Path) -> tuple[str, ...]:
    """What to say of an adapter of PEFT in the folder.

    Raises:
        UserError: if there is nothing else.
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
    """Refuses sizes far beyond what the files hold, before anything is made for them."""
    nbytes = sum(entry.nbytes for entry in files.tensors.values())
    layers, held = config.num_hidden_layers, len(files.tensors)
    if layers > held:
        what = f"{layers} layers, but {files.folder} holds {held} tensors"
    elif num_params(config) > 2 * nbytes:  # of 4 bits
        what = f"{num_params(config)} parameters, but {files.folder} holds {nbytes} bytes of them"
    else:
        return
    raise UserError(f"{origin} describes {what}; correct it or download the model again.")


def _is_untied(config: Llama4Config, plain: Mapping[str, str], files: TensorFiles) -> bool:
    """Whether an embedding and a head that the configuration ties are there with other numbers."""
    pair = [plain.get(f"{name}.weight") for name in ("model.embed_tokens", "lm_head")]
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


def _is_unfused(plain: Mapping[str, str]) -> bool:
    return any(".experts.0." in name for name in plain)


def _around(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A multimodal config.json without its text model's, and without how it was quantized."""
    skipped = ("text_config", compressed_tensors.KEY)
    return {key: value for key, value in mapping.items() if key not in skipped}


def _vision_specs(config, mapping, origin: str, files: TensorFiles) -> dict[str, ParamSpec] | None:
    """None if the files hold no vision tower."""
    if not any(names.is_vision(name) for name in files.tensors):
        return None
    vision = vision_from_hf(mapping, origin)
    if vision is None:
        raise UserError(
            f"{origin} does not describe the vision tower that is there; correct it, or use "
            "--text-only."
        )
    return vision_specs(config, vision)


def _quantized(
    config: Llama4Config,
    rows: tuple[Row, ...],
    plain: Mapping[str, str],
    files: TensorFiles,
    says: Collection[compressed_tensors.Kind],
) -> tuple[dict[str, Format], set[str], dict[str, int]]:
    """Formats of the quantized parameters, which are packed, and how many outputs share a scale."""
    formats, packed, repeats = {}, set(), {}
    blocks = [kind.block for kind in says if kind.block]
    for name, spec in named_specs(config).items():
        stem = _stem(rows, name) if spec.quantizable else None
        scale = plain.get(f"{stem}.weight_scale")
        if scale is None:
            continue
        words, weight = (plain.get(f"{stem}.{x}") for x in ("weight_packed", "weight"))
        kind = QUANTIZED.get(files.tensors[weight].dtype) if weight else None
        kind = "int4" if words else kind
        shared = _shared(files.tensors[scale].shape, spec.matrix_shape[-2:], blocks)
        fits = shared is not None and (not words or (shared[0] == 1 and shared[1] % 2 == 0))
        if kind is None or shared is None or not fits:
            raise UserError(
                f"{files.tensors[scale].file} holds {scale}, but its weight is no matrix of "
                f"{', '.join(QUANTIZED)} or packed words with these scales; download it again."
            )
        formats[name], repeats[name] = Format(kind, shared[1]), shared[0]
        packed |= {name} if words else set()
    return formats, packed, repeats


def _shared(
    scales: tuple[int, ...], matrix: tuple[int, ...], blocks: Iterable[tuple[int, int]]
) -> tuple[int, int] | None:
    """How many outputs and inputs share a scale, by the shape of the scales; None if none fits."""
    inputs, outputs = matrix
    if math.prod(scales) == 1:
        return outputs, inputs
    for out, width in [(1, inputs // scales[-1]) if scales and scales[-1] else (0, 0), *blocks]:
        if out and width and scales == (-(-outputs // out), inputs // width):
            return (out, width) if inputs % width == 0 else None
    return None


def _stem(rows: tuple[Row, ...], ours: str) -> str | None:
    """The module that holds a parameter, of experts the first one's; None if it has no tensor."""
    parts = ours.split(".")
    n = parts[1] if parts[0] == "layers" else "0"
    for row in rows:
        if row.ours[0].replace("{n}", n) == ours and len(row.ours) == 1:
            return row.stored.replace("{n}", n).replace("{j}", "0").removesuffix(".weight")
    return None


def _check_says(says: set[str], formats: Mapping[str, Format], origin: str) -> None:
    if says and not formats:
        raise UserError(f"{origin} says that matrices are quantized, but none is; correct it.")
    if formats and not says:
        raise UserError(
            f"{origin} has no {compressed_tensors.KEY}, but {min(formats)} is quantized; "
            "correct it."
        )
    for name, (kind, _) in formats.items():
        if kind not in says:
            raise UserError(
                f"{origin} says that matrices are in {' and '.join(sorted(says))}, but {name} is "
                f"in {kind}; correct it."
            )


def _open_meta(folder: Path, text_only: bool, ignore_unknown: bool) -> Source:
    if (folder / "config.json").exists():
        mapping, origin = read_object(folder, "config.json"), str(folder / "config.json")
    else:
        origin = str(folder / "params.json")
        mapping = params_json.to_hf_mapping(read_object(folder, "params.json"), origin)
    config = from_hf(mapping, origin, ignore_unknown)
    files = PthFolder(folder)
    _check_sizes(config, files, origin)
    formats = _meta_formats(config, files)
    vision = None if text_only else _vision_specs(config, mapping, origin, files)
    specs = named_specs(config) | (vision or {})
    rows = names.META_TEXT + names.META_VISION
    try:
        groups = expand(rows, array_shapes(config, formats, specs), ranks=files.ranks)
    except ValueError as error:
        raise UserError(f"{folder} contradicts {origin}: {error}; download both again.") from None
    in_files, left_out = match(config, groups, files, str(folder), vision is not None)
    outer = _around(mapping) if vision is not None else None
    return Source(config, outer, specs, formats, groups, files, in_files, left_out)


def _meta_formats(config: Llama4Config, files: PthFolder) -> dict[str, Format]:
    """Formats of fp8 experts: a scale for each output, in `down` also for each rank's inputs."""
    formats = {}
    for n in range(config.num_hidden_layers):
        entry = files.tensors.get(f"0:layers.{n}.feed_forward.experts.moe_w_in_eD_F")
        if entry is None or entry.dtype != "F8_E4M3":
            continue
        ours = f"layers.{n}.feed_forward.experts"
        for name in ("gate", "up"):
            formats[f"{ours}.{name}"] = Format("fp8", config.hidden_size)
        formats[f"{ours}.down"] = Format("fp8", config.intermediate_size // files.ranks)
    return formats
