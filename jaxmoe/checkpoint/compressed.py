"""compressed-tensors, the format of quantized Hugging Face checkpoints: its part of config.json."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from jaxmoe.errors import UserError

KEY = "quantization_config"
METHOD = "compressed-tensors"
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
NAMES = {"fp8": ("float-quantized", "float"), "int8": ("int-quantized", "int")}
KINDS = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4"}  # by type and num_bits


def kinds(mapping: Mapping[str, Any], source: str) -> set[str]:
    """How a config.json says that matrices are quantized: "fp8", "int8", "int4", or not at all.

    Raises:
        UserError: for another method, or what has no place in this project: zero points, and
            inputs in another order.
    """
    found = mapping.get(KEY) or mapping.get("text_config", {}).get(KEY)
    if found is None:
        return set()
    if not isinstance(found, Mapping) or found.get("quant_method") != METHOD:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        _refuse(source, f"quant_method {method!r}", METHOD)
    if found.get("format") not in FORMATS:
        _refuse(source, f"format {found.get('format')!r}", ", ".join(FORMATS))
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse(source, "no config_groups", "one group or more")
    return {_kind(group, source) for group in groups.values()}


def _kind(group: Any, source: str) -> str:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        _refuse(source, "a group without weights", "weights in each")
    if not weights.get("symmetric", True):
        _refuse(source, "weights with zero points", "symmetric ones")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        _refuse(source, f"actorder {weights['actorder']!r}", "inputs in their own order")
    stored = weights.get("type", "int"), weights.get("num_bits", 8)
    if stored not in list(KINDS):  # which compares, and hashes nothing that a file may hold
        _refuse(source, f"{stored[0]} weights of {stored[1]} bits", ", ".join(KINDS.values()))
    return KINDS[stored]


def _refuse(source: str, found: str, expected: str) -> NoReturn:
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
