"""The cases of `jaxmoe benchmark moe`, and the operations and bytes of each.

Shape letters: D embed, F feed-forward width of an expert, E experts.
"""

import dataclasses
import itertools
import math

import numpy as np

from jaxmoe.benchmarks.gpu import COLD_BYTES, SPARE_BYTES
from jaxmoe.benchmarks.moe.routing import experts_of
from jaxmoe.benchmarks.tables import ROUTINGS
from jaxmoe.config import PRESETS, Llama4Config
from pallas_kernels.quantized import default_group_size

MODELS = dict(PRESETS)
MATRIX_FORMATS = ("bf16", "int8", "fp8", "int4")  # of the experts' matrices
BITS = {"bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
TOKENS = {"1": 1, "64": 64, "1k": 1024, "8k": 8192, "64k": 65536}
FEW_TOKENS = 64  # up to this many tokens, as in decoding, reading weights takes most of the time
ALL = ("gate", "up", "down")
PARTS = {  # parts of a layer, and the matrices of an expert that they use
    "gated": ("gate", "up"),
    "down": ("down",),
    "dx": ("down",),
    "dw": ("down",),
    "move": (),  # dispatch and combine
    "routed": ALL,
    "layer": ALL,  # with router and shared expert
}
GRADIENTS = ("dx", "dw")  # the gradients of `down` by rows and by matrices


@dataclasses.dataclass(frozen=True)
class Case:
    """A part of a layer to time on tokens with a given routing.

    Attributes:
        name: as in the tables.
        part: one of PARTS.
        model: one of MODELS.
        tokens: how many tokens there are.
        routing: one of ROUTINGS.
        format: one of MATRIX_FORMATS.
    """

    name: str
    part: str
    model: str
    tokens: int
    routing: str
    format: str = "bf16"

    @property
    def config(self) -> Llama4Config:
        return MODELS[self.model]

    @property
    def family(self) -> str:
        """The name of the kernels that the case runs; cases of a family share their checks."""
        part = "gradients" if self.part in GRADIENTS else self.part
        return part if self.format == "bf16" else f"{part}-{self.format}"

    @property
    def experts(self) -> np.ndarray:
        """The expert of each token, [tokens]."""
        return experts_of(self.routing, self.tokens, self.config.num_local_experts)

    @property
    def active(self) -> int:
        """How many experts have tokens."""
        return len(np.unique(self.experts))

    @property
    def facts(self) -> dict:
        """The case's fields in the file of figures."""
        longest = int(np.bincount(self.experts).max())
        return dataclasses.asdict(self) | {"active_experts": self.active, "longest_group": longest}

    @property
    def work(self) -> dict[str, int | float]:
        """Useful operations and bytes by the rate's unit: of weights, or for a move of rows."""
        if self.part == "move":
            return {"TB/s": 4 * self.tokens * self.config.hidden_size * 2}
        return {"TFLOP/s": self.operations, "TB/s": self.weight_bytes}

    @property
    def operations(self) -> int:
        """Operations of all products: two for each multiply-add."""
        D, F, E = widths(self.config)
        products = len(PARTS[self.part]) * D * F
        if self.part == "layer":
            products = 2 * products + D * E
        return 2 * self.tokens * products

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of experts with tokens; for dw, of the gradient of all experts."""
        D, F, E = widths(self.config)
        count = E if self.part == "dw" else self.active
        nbytes = count * self._expert_bytes
        if self.part == "layer":
            nbytes += 2 * D * (E + 3 * F)
        return nbytes

    @property
    def sets(self) -> int:
        """How many sets of experts to use in rotation so that none stays in the L2 cache."""
        if self.tokens > FEW_TOKENS or not PARTS[self.part] or self.part == "layer":
            return 1
        most = self.config.num_local_experts // self.active
        return min(most, math.ceil(COLD_BYTES / self.weight_bytes))

    @property
    def memory(self) -> int:
        """An estimate of the bytes of weights, their gradient, and rows."""
        D, F, E = widths(self.config)
        weights = E * self._expert_bytes * (2 if self.part == "dw" else 1)
        shared = 2 * D * (E + 3 * F) if self.part == "layer" else 0
        return weights + shared + 6 * self.tokens * (D + F)

    @property
    def _expert_bytes(self) -> int:
        return sum(matrix_bytes(self.config, name, self.format) for name in PARTS[self.part])

    def left_out(self, memory: int) -> str | None:
        """Says why the case does not run on a device with `memory` bytes; None if it does."""
        if self.memory + SPARE_BYTES <= memory:
            return None
        return (
            f"{self.name} is left out: its {self.memory / 1e9:.1f} GB of weights and tokens do not "
            f"fit in the {memory / 1e9:.1f} GB that JAX may use."
        )


def widths(config: Llama4Config) -> tuple[int, int, int]:
    """The sizes (D, F, E) of a model's experts."""
    return config.hidden_size, config.intermediate_size, config.num_local_experts


def matrix_shape(config: Llama4Config, name: str) -> tuple[int, int]:
    """The shape (inputs, outputs) of an expert's gate, up or down."""
    D, F, _ = widths(config)
    return (F, D) if name == "down" else (D, F)


def matrix_bytes(config: Llama4Config, name: str, format: str) -> int:
    """Bytes of one expert's matrix as it is stored, with its scales."""
    inputs, outputs = matrix_shape(config, name)
    values = inputs * outputs * BITS[format] // 8
    scales = 0 if format == "bf16" else 4 * outputs * (inputs // default_group_size(format, inputs))
    return values + scales


def all_cases() -> list[Case]:
    """Every case, in the order of the table."""
    return [
        case
        for part, model, size in itertools.product(PARTS, MODELS, TOKENS)
        for case in _cases(part, model, size)
    ]


def _cases(part: str, model: str, size: str):
    """Yields the cases of a part; one routing for one token, and quantized only for few tokens."""
    tokens = TOKENS[size]
    if part in GRADIENTS and tokens <= FEW_TOKENS:
        return
    for routing in ROUTINGS if tokens > 1 else ("random",):
        name = f"{part}-{model}-{size}-{routing}"
        yield Case(name, part, model, tokens, routing)
        if tokens <= FEW_TOKENS and part in ("gated", "down", "routed"):
            for format in MATRIX_FORMATS[1:]:
                yield Case(f"{name}-{format}", part, model, tokens, routing, format)
