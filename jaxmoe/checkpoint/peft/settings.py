"""`adapter_config.json`: what is read of it, and what it may not ask for."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoe.errors import UserError
from jaxmoe.parsing import read_json

FILE = "adapter_config.json"

# Keys that say nothing of what an adapter computes, or that the names of its tensors say again.
IGNORED = frozenset(
    """
    task_type auto_mapping base_model_name_or_path revision inference_mode lora_dropout r
    rank_pattern target_modules exclude_modules layers_to_transform layers_pattern megatron_config
    megatron_core loftq_config eva_config qalora_group_size runtime_config ensure_weight_tying
    """.split()
)
READ = frozenset(
    "peft_type peft_version lora_alpha use_rslora alpha_pattern target_parameters".split()
)
ALLOWED = {  # the values of other keys that change nothing
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


class Settings(NamedTuple):
    """What an adapter's numbers mean.

    Attributes:
        alpha: over the rank, or its root, it scales the adapter.
        rslora: whether it is over the root.
        alphas: other alphas, by a pattern of names.
        parameters: the tensors of experts that are adapted, or the ends of their names.
        version: PEFT's, as far as the file says.
    """

    alpha: float
    rslora: bool
    alphas: dict[str, float]
    parameters: tuple[str, ...]
    version: tuple[int, int] | None

    def scale(self, key: str, rank: int) -> float:
        """What multiplies the product of the two matrices of this name and rank."""
        both = key, f"{key}.weight"  # of a module, or of a parameter
        matches = (p for p in self.alphas if any(re.match(rf"(.*\.)?({p})$", x) for x in both))
        pattern = next(matches, None)
        alpha = self.alpha if pattern is None else self.alphas[pattern]
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_settings(folder: Path) -> Settings:
    """Reads an adapter's `FILE`.

    Raises:
        UserError: if it is missing or damaged, or asks for anything but plain LoRA.
    """
    file = folder / FILE
    content = read_json(file)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise UserError(f"{file} is of no LoRA adapter (peft_type LORA); other kinds are not read.")
    for key, value in content.items():
        if value and key not in IGNORED | READ and value not in ALLOWED.get(key, ()):
            raise UserError(
                f"{file} gives {str(key)!r:.80} the value {value!r:.80}, which is not supported; "
                "only plain LoRA of matrices is."
            )
    try:
        return _settings(content)
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"{file} is damaged: {error!s:.200}.") from None


def _settings(content: dict[str, Any]) -> Settings:
    alphas = {
        str(key): _alpha(value) for key, value in (content.get("alpha_pattern") or {}).items()
    }
    for pattern in alphas:
        re.compile(pattern)
    parameters = content.get("target_parameters") or ()
    if not isinstance(parameters, list | tuple) or not all(isinstance(x, str) for x in parameters):
        raise ValueError("target_parameters is no list of names")
    version = re.match(r"(\d+)\.(\d+)", content.get("peft_version") or "")
    return Settings(
        _alpha(content.get("lora_alpha")),
        content.get("use_rslora") is True,
        alphas,
        tuple(parameters),
        None if version is None else (int(version[1]), int(version[2])),
    )


def _alpha(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"an alpha is {value!r:.80}, no number")
    return float(value)
