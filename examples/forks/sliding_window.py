"""Sliding-window attention on local layers, in one file beside the library.

    config, params = store.load("model", mesh)
    config = with_sliding_window(config, window=1024)

Everything that takes the config then works as before: `forward`, `generate`, training, meshes, and
the cache, in which these layers keep as many tokens as the window has. A fused decode step and the
Hopper decode kernel need a window that is a multiple of 64 tokens. No checkpoint can say that a
model was trained this way: `store.save` and saved documents refuse such a config.

Rotary angles are float32 of the position in the sequence, exact to a thousandth of a turn up to
about a hundred thousand tokens; chunks, in which positions begin anew, have no such limit.
"""

import dataclasses
from typing import Any

from jaxmoe.config import AttentionSpec, Llama4Config
from pallas_kernels.attention import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowMask(Mask):
    """A query sees itself and the `window - 1` positions of its segment before it.

    Attributes:
        window: positions, 1 or more.
    """

    window: int

    @property
    def span(self) -> int:
        """A window."""
        return self.window

    @property
    def block_diagonal(self) -> bool:
        """Windows overlap: they do not divide the tokens into blocks, as chunks do."""
        return False

    def first(self, position: Any) -> Any:
        """The first position of the window that ends with the query."""
        return position - (self.window - 1)


def with_sliding_window(config: Llama4Config, window: int) -> Llama4Config:
    """The config with windows in place of chunks on its local layers."""
    spec = AttentionSpec(mask=WindowMask(window=window), rope=True, qk_norm=config.use_qk_norm)
    layers = tuple(
        dataclasses.replace(kind, attention=spec) if kind.attention == "local" else kind
        for kind in config.layers
    )
    return dataclasses.replace(config, layers=layers)
