"""Whether files hold exactly the tensors that a configuration asks for, in the right shapes."""

import math
from collections.abc import Iterable
from difflib import get_close_matches

from jaxmoe.checkpoint.formats.safetensors import TensorFiles
from jaxmoe.checkpoint.mapping.names import TEXT_PREFIX, is_unused, is_vision
from jaxmoe.checkpoint.mapping.tensors import Group
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError

Shape = tuple[int, ...]
FLOATS = ("BF16", "F16", "F32")
DTYPES_OF = {"qvalue": ("F8_E4M3", "I8"), "packed": ("I32",)}  # of anything else FLOATS


def match(
    config: Llama4Config,
    groups: Iterable[Group],
    files: TensorFiles,
    source: str,
    keeps_vision: bool,
) -> tuple[dict[str, str], list[str]]:
    """Finds the tensors of all groups in the files, whose names may begin with `language_model.`.

    Args:
        source: what messages call the checkpoint.
        keeps_vision: whether the groups hold the vision side, too.

    Returns:
        The name in the files of every tensor, and the names of what is left out.

    Raises:
        UserError: naming the first tensor that is missing, unknown, there twice, or of another
            shape or dtype than can be read.
    """
    groups = list(groups)
    wanted = _wanted(groups)
    found: dict[str, str] = {}
    left_out = []
    for name in files.tensors:
        plain = name.removeprefix(TEXT_PREFIX)
        if plain in found:
            raise UserError(f"{source} holds both {found[plain]} and {name}; remove one of them.")
        if plain in wanted:
            found[plain] = name
        elif is_unused(name) or (is_vision(name) and not keeps_vision) or _is_tied(config, plain):
            left_out.append(name)
        else:
            _refuse_unknown(name, wanted, source)
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(
                f"{source} lacks the tensor {name} that its configuration asks for; "
                "download it again or correct the configuration."
            )
        _check(files, found[name], shape)
    for group in groups:
        _check_dtypes(files, group, found)
    return found, left_out


def _wanted(groups: Iterable[Group]) -> dict[str, Shape]:
    wanted: dict[str, Shape] = {}
    for group in groups:
        wanted |= group.tensors
        wanted |= dict.fromkeys(group.copies, next(iter(group.tensors.values())))
    return wanted


def _is_tied(config: Llama4Config, name: str) -> bool:
    """A copy of the embedding, which a tied model reads instead."""
    return config.tie_word_embeddings and name == "lm_head.weight"


def _check(files: TensorFiles, name: str, shape: Shape) -> None:
    files.dtype(name)
    entry = files.tensors[name]
    one_number = math.prod(entry.shape) == math.prod(shape) == 1  # [], [1] and [1, 1] are the same
    if entry.shape != shape and not one_number:
        raise UserError(
            f"{entry.file} holds {name} with shape {list(entry.shape)}, but the configuration asks "
            f"for {list(shape)}; correct it or download the model again."
        )


def _check_dtypes(files: TensorFiles, group: Group, found: dict[str, str]) -> None:
    """One dtype for all tensors of a group, and one that what they hold may have."""
    stored = "packed" if group.layout.packed else group.ours[0].rpartition(".")[2]
    allowed = DTYPES_OF.get(stored, FLOATS)
    entries = {name: files.tensors[found[name]] for name in (*group.tensors, *group.copies)}
    first = next(iter(entries.values())).dtype
    for name, entry in entries.items():
        if entry.dtype not in allowed or entry.dtype != first:
            expected = first if first in allowed else " or ".join(allowed)
            raise UserError(
                f"{entry.file} holds {found[name]} as {entry.dtype}, but {expected} is expected; "
                "download the model again."
            )


def _refuse_unknown(name: str, wanted: Iterable[str], source: str) -> None:
    near = get_close_matches(name.removeprefix(TEXT_PREFIX), wanted, n=1, cutoff=0)
    raise UserError(
        f"{source} holds the tensor {name}, which its configuration has no place for (the nearest "
        f"name is {near[0]}); correct the configuration, or remove the tensor."
    )
