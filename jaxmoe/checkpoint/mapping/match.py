"""Checks that files hold exactly the tensors that a configuration asks for, in the right shapes."""

import math
from collections.abc import Iterable
from difflib import get_close_matches

from jaxmoe.checkpoint.formats.tensor_files import TensorFiles
from jaxmoe.checkpoint.mapping.names import TEXT_PREFIX, is_unused, is_vision
from jaxmoe.checkpoint.mapping.tensors import Group, Shape
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError

FLOATS = ("BF16", "F16", "F32")
DTYPES_OF = {"qvalue": ("F8_E4M3", "I8"), "packed": ("I32",)}  # all other tensors: FLOATS


def match(
    config: Llama4Config,
    groups: Iterable[Group],
    files: TensorFiles,
    source: str,
) -> tuple[dict[str, str], list[str]]:
    """Finds every tensor of some groups in files, where names may begin with `language_model.`.

    Args:
        config: of the model; without vision, tensors of a tower are left out.
        groups: of all parameters that are to be read.
        files: the files.
        source: what error messages call the checkpoint.

    Returns:
        The name in the files of every tensor of the groups, and the names of the files' other
        tensors, which no model needs or which were not asked for.

    Raises:
        UserError: naming the first tensor that is missing, unknown, stored twice, or has a shape or
            dtype other than expected.
    """
    groups = list(groups)
    wanted = _wanted_shapes(groups)
    drops_vision = config.vision is None
    stored_names: dict[str, str] = {}
    left_out = []
    for name in files.tensors:
        plain = name.removeprefix(TEXT_PREFIX)
        if plain in stored_names:
            raise UserError(
                f"{source} holds both {stored_names[plain]} and {name}; remove one of them."
            )
        if plain in wanted:
            stored_names[plain] = name
        elif is_unused(name) or (is_vision(name) and drops_vision) or _is_tied(config, plain):
            left_out.append(name)
        else:
            _refuse_unknown(name, wanted, source)
    for name, shape in wanted.items():
        if name not in stored_names:
            raise UserError(
                f"{source} lacks the tensor {name} that its configuration asks for; "
                "download it again or correct the configuration."
            )
        _check_shape(files, stored_names[name], shape)
    for group in groups:
        _check_dtypes(files, group, stored_names)
    return stored_names, left_out


def _wanted_shapes(groups: Iterable[Group]) -> dict[str, Shape]:
    wanted: dict[str, Shape] = {}
    for group in groups:
        wanted |= group.tensors
        wanted |= dict.fromkeys(group.copies, next(iter(group.tensors.values())))
    return wanted


def _is_tied(config: Llama4Config, name: str) -> bool:
    """Whether a tensor is a copy of the embedding, which serves as the head of a tied model."""
    return config.tie_word_embeddings and name == "lm_head.weight"


def _check_shape(files: TensorFiles, name: str, shape: Shape) -> None:
    files.dtype(name)  # refuses unknown ones, of which even the size is not known
    entry = files.tensors[name]
    one_number = math.prod(entry.shape) == math.prod(shape) == 1  # [], [1] and [1, 1] are the same
    if entry.shape != shape and not one_number:
        raise UserError(
            f"{entry.file} holds {name} with shape {list(entry.shape)}, but the configuration asks "
            f"for {list(shape)}; correct it or download the model again."
        )


def _check_dtypes(files: TensorFiles, group: Group, stored_names: dict[str, str]) -> None:
    """Refuses a group whose tensors differ in dtype, or have one that is not for their kind."""
    stored = "packed" if group.layout.packed else group.params[0].rpartition(".")[2]
    allowed = DTYPES_OF.get(stored, FLOATS)
    entries = {name: files.tensors[stored_names[name]] for name in (*group.tensors, *group.copies)}
    first = next(iter(entries.values())).dtype
    for name, entry in entries.items():
        if entry.dtype not in allowed or entry.dtype != first:
            expected = first if first in allowed else " or ".join(allowed)
            raise UserError(
                f"{entry.file} holds {stored_names[name]} as {entry.dtype}, but {expected} is "
                "expected; download the model again."
            )


def _refuse_unknown(name: str, wanted: Iterable[str], source: str) -> None:
    near = get_close_matches(name.removeprefix(TEXT_PREFIX), wanted, n=1, cutoff=0)
    raise UserError(
        f"{source} holds the tensor {name}, which its configuration has no place for (the nearest "
        f"name is {near[0]}); correct the configuration, or remove the tensor."
    )
