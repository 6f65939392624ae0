"""Which parameters of a Hugging Face checkpoint are quantized, and how, by the tensors it has."""

import math
from collections.abc import Collection, Iterable, Mapping

from jaxmoe.checkpoint.formats import compressed_tensors
from jaxmoe.checkpoint.formats.tensor_files import TensorFiles
from jaxmoe.checkpoint.mapping.names import Packing, Row
from jaxmoe.checkpoint.mapping.tensors import Format, Shape
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.model.params import named_specs

FORMATS = {"F8_E4M3": "fp8", "I8": "int8"}  # by the dtype of a matrix that is not packed


def find_formats(
    config: Llama4Config,
    rows: tuple[Row, ...],
    stored_names: Mapping[str, str],
    files: TensorFiles,
    stated: Collection[compressed_tensors.Kind],
) -> tuple[dict[str, Format], dict[str, Packing]]:
    """The format and the packing of every quantized parameter, by name.

    A parameter is quantized if its module has a `weight_scale`.

    Args:
        config: of the text model.
        rows: the kinds of tensors in the files.
        stored_names: the names in the files, by the names without `language_model.`.
        files: the files.
        stated: how the configuration says that matrices are quantized, for the sizes of blocks.

    Raises:
        UserError: if the shapes of a matrix and its scales do not fit.
    """
    formats: dict[str, Format] = {}
    packing: dict[str, Packing] = {}
    blocks = [kind.block for kind in stated if kind.block]
    for name, spec in named_specs(config).items():
        module = _module_of(rows, name) if spec.quantizable else None
        scale = stored_names.get(f"{module}.weight_scale")
        if scale is None:
            continue
        packed, weight = (stored_names.get(f"{module}.{x}") for x in ("weight_packed", "weight"))
        kind = FORMATS.get(files.tensors[weight].dtype) if weight else None
        kind = "int4" if packed else kind
        shared = _sharing(files.tensors[scale].shape, spec.matrix_shape[-2:], blocks)
        fits = shared is not None and (not packed or (shared[0] == 1 and shared[1] % 2 == 0))
        if kind is None or shared is None or not fits:
            raise UserError(
                f"{files.tensors[scale].file} holds {scale}, but its weight is no matrix of "
                f"{', '.join(FORMATS)} or packed words with these scales; download it again."
            )
        outputs, inputs = shared
        formats[name] = Format(kind, inputs)
        packing[name] = Packing(packed is not None, outputs)
    return formats, packing


def _sharing(
    scales: Shape, matrix: Shape, blocks: Iterable[tuple[int, int]]
) -> tuple[int, int] | None:
    """How many outputs and how many inputs share a scale; None if the shapes do not fit.

    Args:
        scales: the shape of the scales: [], or [outputs, groups of inputs].
        matrix: (inputs, outputs).
        blocks: the (outputs, inputs) that may share a scale, as the configuration states them.
    """
    inputs, outputs = matrix
    if math.prod(scales) == 1:
        return outputs, inputs
    a_scale_per_group = (1, inputs // scales[-1]) if scales and scales[-1] else (0, 0)
    for rows, columns in [a_scale_per_group, *blocks]:
        if rows and columns and scales == (-(-outputs // rows), inputs // columns):
            return (rows, columns) if inputs % columns == 0 else None
    return None


def _module_of(rows: tuple[Row, ...], param: str) -> str | None:
    """The module that holds a parameter, of experts the first one's; None if none does alone."""
    parts = param.split(".")
    n = parts[1] if parts[0] == "layers" else "0"
    for row in rows:
        if row.params[0].replace("{n}", n) == param and len(row.params) == 1:
            return row.tensor.replace("{n}", n).replace("{j}", "0").removesuffix(".weight")
    return None


def check_stated(stated: set[str], formats: Mapping[str, Format], origin: str) -> None:
    """Refuses a configuration that states other formats than the tensors have.

    Args:
        stated: the names of the formats that the configuration states.
        formats: those of the tensors, by parameter.
        origin: the configuration's file, for error messages.

    Raises:
        UserError: naming the first parameter that differs.
    """
    if stated and not formats:
        raise UserError(f"{origin} says that matrices are quantized, but none is; correct it.")
    if formats and not stated:
        raise UserError(
            f"{origin} has no {compressed_tensors.KEY}, but {min(formats)} is quantized; "
            "correct it."
        )
    for name, (kind, _) in formats.items():
        if kind not in stated:
            raise UserError(
                f"{origin} says that matrices are in {' and '.join(sorted(stated))}, but {name} is "
                f"in {kind}; correct it."
            )
