"""A fork: LoRA on the attention projections (arXiv 2106.09685).

Each matrix W becomes W + SCALE * a @ b, where only the small matrices a and b are trained:

    python examples/forks/lora_attention.py RUN.yaml

trains as the YAML file says (docs/training.md), whose `init` is a checkpoint. The checkpoint that
it writes has the adapters added to the matrices, so everything else reads it.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import jaxmoe
from jaxmoe.mesh import param_spec
from jaxmoe.model.params import ParamSpec, attention_specs
from jaxmoe.train.config import read_train_config
from jaxmoe.train.loss import next_token_loss
from jaxmoe.train.trainer import train

RANK, SCALE = 8, 2.0


def with_adapters(config: jaxmoe.Llama4Config, params: dict, seed: int = 0) -> dict:
    """The parameters and adapters that change nothing yet: `a` is random, `b` is zero."""
    mesh, keys = params["embed"].sharding.mesh, iter(jax.random.split(jax.random.key(seed), 2**12))

    def adapter(spec: ParamSpec) -> dict:
        inputs = len(spec.inputs or ())
        a = jax.random.normal(next(keys), (*spec.shape[:inputs], RANK)) * (spec.fan_in or 1) ** -0.5
        b = jnp.zeros((RANK, *spec.shape[inputs:]))
        a_spec, b_spec = (*spec.axes[:inputs], None), (None, *spec.axes[inputs:])
        places = (NamedSharding(mesh, param_spec(axes)) for axes in (a_spec, b_spec))
        return dict(zip("ab", map(jax.device_put, (a, b), places), strict=True))

    specs = attention_specs(config)
    adapters = [{name: adapter(specs[name]) for name in specs} for _ in config.layers]
    return params | {"adapters": adapters}


def merged(params: dict) -> dict:
    """The model's own parameters, each adapter added to its matrix."""

    def added(w: jax.Array, adapter: dict) -> jax.Array:
        return (w + SCALE * jnp.tensordot(adapter["a"], adapter["b"], 1)).astype(w.dtype)

    layers = [
        p | {"attention": {name: added(w, adapters[name]) for name, w in p["attention"].items()}}
        for p, adapters in zip(params["layers"], params["adapters"], strict=True)
    ]
    return {name: params[name] for name in params if name != "adapters"} | {"layers": layers}


def loss(model: jaxmoe.Llama4Config, params: dict, batch) -> tuple[jax.Array, dict]:
    """The cross entropy of next tokens, for `train`."""
    return next_token_loss()(model, merged(params), batch)


def trainable(name: str) -> bool:
    """Adapters are trained, and nothing else."""
    return name.startswith("adapters.")


if __name__ == "__main__":
    run = read_train_config(sys.argv[1])
    mesh = jaxmoe.MeshConfig.parse(run.mesh or "data=-1").make()
    config, params = jaxmoe.load(run.init or "", mesh)
    init = with_adapters(config, params)
    with jax.set_mesh(mesh):
        for record in train(run, mesh, loss=loss, init=init, trainable=trainable, result=merged):
            print(record)
