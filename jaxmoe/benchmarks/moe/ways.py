"""Ways to multiply tokens by their experts' matrices, for `jaxmoe benchmark moe`.

`plan` says where tokens go, `rows` takes them there and `back` from there; `gated` and `down` are
the products. `weights` are those of one set of tokens.

Shape letters: T tokens, R rows, D width, F width of an expert, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.config import SCOUT
from jaxmoe.model.kernels import Kernels
from jaxmoe.model.layers import linear, swiglu
from jaxmoe.model.moe import moe, run_experts
from pallas_kernels.experts import (
    block_rows,
    combine,
    dispatch,
    gated_matmul,
    grouped_matmul,
    make_group_metadata,
)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """jaxmoe's way: groups begin on block boundaries. Whole layers are the model's own code."""

    num_experts: int
    implementation: str
    across = 1  # matrices side by side

    def weights(self, weights: dict, number: int) -> dict:
        return weights

    def plan(self, expert):
        block = block_rows(len(expert), self.num_experts)
        return make_group_metadata(expert, self.num_experts, block)

    def rows(self, plan, x):
        served = x.shape[1] > 1  # a column of scales is not
        return dispatch(plan, x, implementation=self.implementation if served else None)

    def back(self, plan, y):
        return combine(plan, y, implementation=self.implementation)

    def gated(self, p, x, scale, plan):
        matrices = p["gate"], p["up"], plan.group_of_block, scale
        return gated_matmul(x, *matrices, implementation=self.implementation)

    def down(self, p, x, plan):
        return grouped_matmul(x, p["down"], plan.group_of_block, implementation=self.implementation)

    def routed(self, p, x, expert, weight):
        choices = expert[None, :, None], weight[None, :, None]
        return run_experts(self.num_experts, 0, p, x[None], *choices, kernels=self._kernels)[0]

    def layer(self, weights, x, real):
        config = dataclasses.replace(SCOUT, num_local_experts=self.num_experts)
        return moe(config, weights, x[None], real[None], self._kernels)[0][0]

    @property
    def _kernels(self) -> Kernels:
        """Products by this implementation; moves of tokens by XLA with it, else by the fastest."""
        dispatch = "xla" if self.implementation == "xla" else None
        return Kernels(experts=self.implementation, dispatch=dispatch)


def _routed(way, p, x, expert, weight):
    """The experts of a layer, composed of the parts of a way."""
    plan = way.plan(expert)
    scale = way.rows(plan, weight[:, None])[:, 0]
    hidden = way.gated(p, way.rows(plan, x), scale, plan)
    return way.back(plan, way.down(p, hidden, plan))


@dataclasses.dataclass(frozen=True)
class Ragged:
    """JAX alone: rows sorted by expert, `jax.lax.ragged_dot`, and sorted back."""

    num_experts: int
    across = 1

    def weights(self, weights: dict, number: int) -> dict:
        return weights

    def plan(self, expert):
        return jnp.argsort(expert), jnp.bincount(expert, length=self.num_experts)

    def rows(self, plan, x):
        return x[plan[0]]

    def back(self, plan, y):
        return jnp.zeros_like(y).at[plan[0]].set(y, unique_indices=True)

    def gated(self, p, x, scale, plan):
        gate, up = (scale[:, None] * self._product(x, p[name], plan) for name in ("gate", "up"))
        return jax.nn.silu(gate) * up

    def down(self, p, x, plan):
        return self._product(x, p["down"], plan)

    def _product(self, x, w, plan):
        return jax.lax.ragged_dot(x, w, plan[1].astype(jnp.int32))

    def routed(self, p, x, expert, weight):
        return _routed(self, p, x, expert, weight)

    def layer(self, weights, x, real):
        del real  # all are
        logits = linear("TD,DE->TE", x, weights["router"])
        weight = jax.nn.sigmoid(jnp.max(logits, axis=-1).astype(jnp.float32)).astype(x.dtype)
        routed = self.routed(weights["experts"], x, jnp.argmax(logits, axis=-1), weight)
        return swiglu(weights["shared"], x[None])[0] + routed


@dataclasses.dataclass(frozen=True)
class Dense:
    """No groups: T / A rows by the matrices of A experts side by side, as many as have tokens.

    Operations and weights are those of the experts; values are not.
    """

    num_experts: int
    across: int

    def weights(self, weights: dict, number: int) -> dict:
        if self.across == self.num_experts:
            return weights
        first = number * self.across
        experts = {name: w[first : first + self.across] for name, w in weights["experts"].items()}
        return {"experts": experts}

    def plan(self, expert):
        return None

    def rows(self, plan, x):
        return x[: -(-len(x) // self.across)]

    def back(self, plan, y):
        return y

    def gated(self, p, x, scale, plan):
        gate, up = (
            scale[:, None] * (x @ p[name].reshape(x.shape[1], -1)) for name in ("gate", "up")
        )
        return jax.nn.silu(gate) * up

    def down(self, p, x, plan):
        return x @ p["down"].reshape(x.shape[1], -1)

    def routed(self, p, x, expert, weight):
        return _routed(self, p, x, expert, weight)
