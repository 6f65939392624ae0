"""The steps of `jaxmoe benchmark schedule`: decoding, compiled for eight absent GPUs."""

import dataclasses
import functools
from typing import Any

from jaxmoe.config import PRESETS, Llama4Config
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import round_capacity
from jaxmoe.plan.operations import entry_operations, marginal_operations, of_layer
from jaxmoe.plan.steps import abstract_arguments, lower_step
from jaxmoe.plan.targets import Target, absent_devices, parse_target
from pallas_kernels.compile.absent import compiler_options

PERIOD = 4  # the number of layers after which their kinds repeat
MESH, KV = "tensor=8", "int8"
CONTEXTS = {1: 1_000_000, 64: 65536}  # tokens of each row, by the number of rows


@dataclasses.dataclass(frozen=True)
class Step:
    """A decoding step: one new token for each row.

    Attributes:
        model: the name of a preset.
        rows: the batch size.
    """

    model: str
    rows: int

    @property
    def name(self) -> str:
        return f"step-{self.model}-{self.rows}"

    @property
    def config(self) -> Llama4Config:
        return PRESETS[self.model]

    def figures(self, target: Target) -> dict[str, Any]:
        """The step's figures: operations of a further layer, by kind of operation and of layer."""
        compile_layers = functools.cache(functools.partial(self.compiled, str(target.compiler)))
        last = entry_operations(compile_layers(2 * PERIOD))
        kinds = enumerate(self.config.layers[PERIOD : 2 * PERIOD], PERIOD)
        return {
            **{"name": self.name, "model": self.model, "rows": self.rows},
            **{"context": CONTEXTS[self.rows], "mesh": MESH, "cache": KV},
            "a_layer": marginal_operations(compile_layers, PERIOD),
            "by_layer": {
                f"{kind.attention}, {kind.feed_forward}": len(of_layer(last, i))
                for i, kind in kinds
            },
        }

    def compiled(self, gpu: str, layers: int) -> str:
        """Compiles the model's first `layers` layers for eight GPUs; returns the HLO text."""
        mesh = MeshConfig.parse(MESH).make(absent_devices(parse_target(f"{gpu}x8")))
        config = dataclasses.replace(self.config, layers=self.config.layers[:layers])
        capacity = round_capacity(CONTEXTS[self.rows], mesh)
        sizes = {"rows": self.rows, "tokens": 1, "capacity": capacity, "kv": KV}
        lowered = lower_step(config, mesh, abstract_arguments(config, mesh, **sizes))
        return lowered.compile(compiler_options()).as_text() or ""


def all_steps() -> list[Step]:
    """The steps of both models, and of one and of many rows."""
    return [Step("scout", 1), Step("scout", 64), Step("maverick", 1)]
