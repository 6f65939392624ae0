"""The `quantization_config` of config.json, as compressed-tensors writes it.

compressed-tensors is the format of quantized Hugging Face checkpoints.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from jaxmoe.errors import UserError

KEY = "quantization_config"
METHOD = "compressed-tensors"
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
NAMES = {"fp8": ("float-quantized", "float"), "int8": ("int-quantized", "int")}
PACKED = "pack-quantized"
KINDS = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4"}  # by type and num_bits
STRATEGIES = ("tensor", "channel", "group", "block")  # what shares a scale


class Kind(NamedTuple):
    """How some matrices are quantized.

    Attributes:
        name: "fp8", "int8" or "int4".
        block: the (outputs, inputs) that share a scale; None if that follows from the shapes of the
            scales.
    """

    name: str
    block: tuple[int, int] | None = None


def kinds(mapping: Mapping[str, Any], source: str) -> set[Kind]:
    """How a config.json says that matrices are quantized; an empty set if they are not.

    Args:
        mapping: the parsed config.json.
        source: its file, for error messages.

    Raises:
        UserError: for another method than compressed-tensors, and for what is not supported: zero
            points, reordered inputs, and 8-bit values packed in words.
    """
    config = mapping.get(KEY)
    if config is None and isinstance(mapping.get("text_config"), Mapping):
        config = mapping["text_config"].get(KEY)
    if config is None:
        return set()
    if not isinstance(config, Mapping) or config.get("quant_method") != METHOD:
        method = config.get("quant_method") if isinstance(config, Mapping) else config
        _refuse(source, f"quant_method {method!r:.80}", METHOD)
    if config.get("format") not in FORMATS:
        _refuse(source, f"format {config.get('format')!r:.80}", ", ".join(FORMATS))
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse(source, "no config_groups", "one group or more")
    stated = {_kind(group, source) for group in groups.values()}
    if config["format"] == PACKED and any(kind.name != "int4" for kind in stated):
        _refuse(source, "8-bit weights packed in words (W8A16)", "packed words of 4 bits")
    return stated


def _kind(group: Any, source: str) -> Kind:
    """How the matrices of one of the `config_groups` are quantized."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        _refuse(source, "a group without weights", "weights in each")
    if weights.get("symmetric", True) is not True:
        _refuse(source, "weights with zero points", "symmetric ones")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        _refuse(source, f"actorder {weights['actorder']!r:.80}", "inputs in their own order")
    stored = weights.get("type", "int"), weights.get("num_bits", 8)
    if stored not in list(KINDS):  # a list, since the file's values may not be hashable
        _refuse(
            source,
            f"{stored[0]!s:.80} weights of {stored[1]!s:.80} bits",
            ", ".join(KINDS.values()),
        )
    strategy = weights.get("strategy")
    if strategy not in (None, *STRATEGIES):
        _refuse(source, f"strategy {strategy!r:.80}", ", ".join(STRATEGIES))
    return Kind(KINDS[stored], _block(weights, source) if strategy == "block" else None)


def _block(weights: Mapping[str, Any], source: str) -> tuple[int, int]:
    """The (outputs, inputs) that share a scale with the strategy "block"."""
    sizes = weights.get("block_structure")
    is_pair = isinstance(sizes, list) and len(sizes) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in sizes):
        _refuse(source, f"block_structure {sizes!r:.80}", "a pair of sizes")
    return sizes[0], sizes[1]


def _refuse(source: str, found: str, expected: str) -> NoReturn:
    """Raises a UserError about a `quantization_config` that cannot be read."""
    raise UserError(
        f"{source} has a {KEY} with {found}; only {expected} can be read, so use another release."
    )


def describe(format: str, ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` for matrices with one scale per output.

    Args:
        format: "fp8" or "int8".
        ignored: the names of the modules that are not quantized.
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
