"""One tiny MoE layer for tests: its parameters, and tokens of which some are padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import mesh as meshes
from jaxmoe.config import SCOUT
from jaxmoe.model.moe import moe
from jaxmoe.model.params import map_specs, moe_specs


def config(k=1, *, D=16, F=8, E=8):
    sizes = {"hidden_size": D, "intermediate_size": F, "num_local_experts": E}
    return dataclasses.replace(SCOUT, num_experts_per_tok=k, **sizes)


def draw(config, rows, length, skew=0.0, seed=0):
    """Float32 parameters, tokens, and which tokens are real.

    Args:
        skew: how far all tokens lie towards the first expert; 0 is none, 5 is nearly all to one.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    p = map_specs(lambda spec: spec.init(next(keys), jnp.float32), moe_specs(config))
    x = jax.random.normal(next(keys), (rows, length, config.hidden_size))
    towards = p["router"][:, 0] / jnp.linalg.norm(p["router"][:, 0])
    real = jax.random.bernoulli(next(keys), 0.9, (rows, length))
    return p, x + skew * towards, real


def place(config, p, mesh):
    """Parameters where the mesh keeps them."""
    return map_specs(
        lambda spec, w: jax.device_put(w, meshes.sharding(mesh, meshes.param_spec(spec.axes))),
        moe_specs(config),
        p,
    )


def run(config, p, x, real):
    """`moe` as a decoder layer calls it: parameters gathered over fsdp, activations laid out."""
    specs = moe_specs(config)
    p = map_specs(lambda spec, w: meshes.constrain_param(w, spec.axes), specs, p)
    out, stats = moe(config, p, meshes.constrain(x, "batch", "length", None), real)
    return meshes.constrain(out, "batch", "length", None), stats


def results(config, p, x, real):
    """Output, statistics, and gradients with respect to parameters and tokens, all NumPy.

    The gradient is that of the output and of what the statistics have of one.
    """

    def loss(p, x):
        out, stats = run(config, p, x, real)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        spread = jnp.arange(stats.mean_probability.size) @ stats.mean_probability
        return jnp.sum(out * weights) + spread + stats.entropy, (out, stats)

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (dp, dx), (out, stats) = jax.jit(gradient)(p, x)
    return jax.tree.map(np.asarray, {"p": dp, "x": dx, "out": out, "stats": stats._asdict()})
