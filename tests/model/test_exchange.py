"""Experts spread over the mesh: every way of bringing tokens to them gives the same answer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import PRESETS
from jaxmoe.mesh import MeshConfig
from jaxmoe.model import moe
from pallas_kernels.compile.absent import absent_h100s, compiler_options
from tests.model import moe_layer
from tests.tiers import slow_after_first

D, F, E = 16, 8, 8
MESHES = [
    "expert=8",
    "expert=4,tensor=2",
    "data=2,expert=2,sequence=2",
    "fsdp=2,expert=4",
]


def config(k):
    sizes = {"hidden_size": D, "num_local_experts": E, "num_experts_per_tok": k}
    return dataclasses.replace(PRESETS["scout"], **sizes)


def draw(k, tokens, skew=0.0):
    """Experts' matrices, tokens and their routing; with `skew`, most tokens choose expert 0."""
    rng = np.random.default_rng(k)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    p = {
        name: 0.2 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    x = rng.standard_normal((8, tokens, D)).astype(np.float32)
    router = rng.standard_normal((D, E)).astype(np.float32)
    real = jnp.asarray(rng.random(x.shape[:2]) > 0.1)
    routing = moe.route(config(k), jnp.asarray(router), jnp.asarray(x), real)
    taken = (rng.random(routing.expert.shape) < skew) & (np.asarray(routing.expert) < E)
    return p, x, routing._replace(expert=jnp.where(taken, 0, routing.expert))


def results(k, p, x, routing):
    """Output, and gradients with respect to matrices, tokens and scores."""

    def run(p, x, weight):
        return moe.spread_over_mesh(config(k), p, x, routing._replace(router_weight=weight))[0]

    @jax.jit
    def both(p, x, weight):
        out, transpose = jax.vjp(run, p, x, weight)
        return out, *transpose(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return jax.tree.map(np.asarray, both(p, x, routing.router_weight))


@pytest.mark.parametrize(
    ("k", "skew"), slow_after_first([(1, 0.9), (2, 0.0)]), ids=["most to one", "two each"]
)
@pytest.mark.parametrize("tokens", [1, 160], ids=["few tokens", "many tokens"])
def test_every_mesh_gives_the_same(tokens, k, skew):
    case = draw(k, tokens, skew)
    want, ways = results(k, *case), set()
    for text in MESHES:
        mesh = MeshConfig.parse(text).make()
        with jax.set_mesh(mesh):
            got = results(k, *case)
        ways.add(moe.expert_exchange(mesh, case[1].shape))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=text)
    assert "all_to_all" in ways if tokens > moe.FEW_TOKENS else ways == {"all_gather"}


WAYS = [
    # No experts on several devices.
    ("data=8", (8, 4096), "replicated"),
    ("tensor=8", (8, 4096), "replicated"),
    ("fsdp=4,sequence=2", (8, 4096), "replicated"),
    # Rows that the expert axis does not divide, after those before it, lie on all of its devices.
    ("expert=8", (1, 4096), "replicated"),
    ("expert=8", (12, 4096), "replicated"),
    ("data=2,expert=4", (2, 4096), "replicated"),
    ("fsdp=4,expert=2", (4, 4096), "replicated"),
    # Decoding.
    ("expert=8", (8, 1), "all_gather"),
    ("expert=8", (512, 1), "all_gather"),
    ("expert=8", (520, 1), "all_to_all"),
    ("expert=4,tensor=2", (256, 1), "all_gather"),
    ("expert=4,tensor=2", (260, 1), "all_to_all"),
    # Prefill and training.
    ("expert=8", (8, 64), "all_gather"),
    ("expert=8", (8, 65), "all_to_all"),
    ("expert=4,sequence=2", (4, 128), "all_gather"),
    ("expert=4,sequence=2", (4, 130), "all_to_all"),
    ("expert=4,sequence=2", (4, 127), "all_to_all"),  # which two do not divide: 127 a device
    ("data=2,fsdp=2,expert=2", (8, 8192), "all_to_all"),
]


@pytest.mark.parametrize(("text", "shape", "way"), WAYS)
def test_way_of_typical_meshes(text, shape, way):
    """Known from sizes alone: the same of a mesh without devices."""
    mesh = MeshConfig.parse(text).make()
    assert moe.expert_exchange(mesh, (*shape, D)) == way
    assert moe.expert_exchange(mesh.abstract_mesh, (*shape, D)) == way


@pytest.mark.parametrize("shape", [(1, 16), (8, 1), (8, 72)])
def test_the_way_that_is_named_is_traced(shape, monkeypatch):
    """Chosen once, when traced, by the shape over the whole mesh."""
    traced, ways = (
        [],
        {name: getattr(moe, f"_{name}") for name in ("replicated", "all_gather", "all_to_all")},
    )
    for name, way in ways.items():

        def noted(*arguments, name=name, way=way):
            traced.append(name)
            return way(*arguments)

        monkeypatch.setattr(moe, f"_{name}", noted)
    case, mesh = moe_layer.config(), MeshConfig(expert=4, tensor=2).make()
    with jax.set_mesh(mesh):
        jax.eval_shape(functools.partial(moe.moe, case), *moe_layer.draw(case, *shape))
    assert traced == [moe.expert_exchange(mesh, (*shape, D))]


@pytest.mark.absent_gpu
def test_tokens_are_exchanged_on_gpus():
    """Each row travels to one device: a ragged all-to-all, and no gather of tokens."""
    mesh = MeshConfig(expert=8).make(absent_h100s(8))
    p, x, routing = draw(1, 160)
    bf16 = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), (p, x))

    def run(p, x, expert, weight):
        given = routing._replace(expert=expert, router_weight=weight)
        return moe.spread_over_mesh(config(1), p, x, given)[0]

    def loss(*arguments):
        return run(*arguments).astype(jnp.float32).sum()

    rest = (routing.expert, routing.router_weight.astype(jnp.bfloat16))
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).lower(*bf16, *rest)
    hlo = lowered.compile(compiler_options()).as_text()
    assert hlo.count("ragged-all-to-all(") + hlo.count("ragged-all-to-all-start(") >= 2
