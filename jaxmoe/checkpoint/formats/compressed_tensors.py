"""compressed-tensors, the format of quantized Hugging Face checkpoints: its part of config.json."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from jaxmoe.errors import UserError

KEY = "quantization_config"
METHOD = "compressed-tensors"
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
NAMES = {"fp8": ("float-quantized", "float"), "int8": ("int-quantized", "int")}
PACKED = "pack-quantized"
KINDS = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4"}  # by type and num_bits


STRATEGIES = ("tensor", "channel", "group", "block")  # of what shares a scale


class Kind(NamedTuple):
    """How matrices are quantized: "fp8", "int8" or "int4", and the (outputs, inputs) of blocks.

    Without blocks, the shapes of the scales say how many there are.
    """

    name: str
    block: tuple[int, int] | None = None


def kinds(mapping: Mapping[str, Any], source: str) -> set[Kind]:
    """How a config.json says that matrices are quantized; none if they are not.

    Raises:
        UserError: for another method, or what has no place in this project: zero points, and
            inputs in another order.
    """
    found = mapping.get(KEY)
    if found is None and isinstance(mapping.get("text_config"), Mapping):
        found = mapping["text_config"].get(KEY)
    if found is None:
        return set()
    if not isinstance(found, Mapping) or found.get("quant_method") != METHOD:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        refuse(source, f"quant_method {method!r:.80}", METHOD)
    if found.get("format") not in FORMATS:
        refuse(source, f"format {found.get('format')!r:.80}", ", ".join(FORMATS))
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        refuse(source, "no config_groups", "one group or more")
    said = {_kind(group, source) for group in groups.values()}
    if found["format"] == PACKED and any(kind.name != "int4" for kind in said):
        refuse(source, "8-bit weights packed in words (W8A16)", "packed words of 4 bits")
    return said


def _kind(group: Any, source: str) -> Kind:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        refuse(source, "a group without weights", "weights in each")
    if weights.get("symmetric", True) is not True:
        refuse(source, "weights with zero points", "symmetric ones")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        refuse(source, f"actorder {weights['actorder']!r:.80}", "inputs in their own order")
    stored = weights.get("type", "int"), weights.get("num_bits", 8)
    if stored not in list(KINDS):  # which compares, and hashes nothing that a file may hold
        refuse(
            source,
            f"{stored[0]!s:.80} weights of {stored[1]!s:.80} bits",
            ", ".join(KINDS.values()),
        )
    strategy = weights.get("strategy")
    if strategy not in (None, *STRATEGIES):
        refuse(source, f"strategy {strategy!r:.80}", ", ".join(STRATEGIES))
    return Kind(KINDS[stored], _block(weights, source) if strategy == "block" else None)


def _block(weights: Mapping[str, Any], source: str) -> tuple[int, int]:
    sizes = weights.get("block_structure")
    is_pair = isinstance(sizes, list) and len(sizes) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in sizes):
        refuse(source, f"block_structure {sizes!r:.80}", "a pair of sizes")
    return sizes[0], sizes[1]


def refuse(source: str, found: str, expected: str) -> NoReturn:
    """Raises a UserError about how a checkpoint is quantized."""
    raise UserError(
        f"{source} has a {KEY} with {found}; only {expected} can be read, so use another release."
    )


def describe(format: str, ignored: Iterable[str]) -> dict[str, Any]:
    """The part of config.json for matrices with one scale an output.

    Args:
        format: "fp8" or "int8".
        ignored: names of the modules that are not quantized.
    """
    name, kind = NAMES[format]
    shared = {"num_bits": 8, "type": kind, "symmetric": True}
    weights = {**shared, "strategy": "channel", "dynamic": False}
    activations = {**shared, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": METHOD,
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
    }
