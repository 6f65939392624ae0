"""The loss in chunks of the vocabulary is that of whole logits, on any mesh, in bounded memory."""

import contextlib
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import mesh as meshes
from jaxmoe.config import PRESETS
from jaxmoe.mesh import MeshConfig
from jaxmoe.train import cross_entropy
from jaxmoe.train.cross_entropy import token_losses
from pallas_kernels.compile.absent import absent_h100s, compiler_options

V, D = 101, 32  # no axis of a mesh divides V
B, S = 4, 8
MESHES = [
    "data=2,fsdp=2,tensor=2",
    "expert=2,sequence=2,tensor=2",
    "fsdp=8",  # does not divide the rows, which are then on all devices
    "sequence=4,fsdp=2",
    "fsdp=2,tensor=4",
]


class Case(NamedTuple):
    hidden: np.ndarray  # [B, S, D]
    head: np.ndarray  # [D, V]
    targets: np.ndarray  # [B, S]
    weights: np.ndarray  # [2, B, S], of nats and of squared log-sum-exps; some are 0


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, S, D)), rng.normal(size=(D, V)) * 3 * D**-0.5
    weights = rng.normal(size=(2, B, S)) * (rng.random((B, S)) < 0.7)
    targets = rng.integers(V, size=(B, S))
    targets[:, :3] = np.argmax(hidden @ head, axis=-1)[:, :3]
    return Case(hidden.astype("f"), head.astype("f"), targets, weights.astype("f"))


@pytest.fixture
def chunk(monkeypatch):
    """A function that sets how much of the vocabulary a chunk has."""

    def set_size(size):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 0)
        monkeypatch.setattr(cross_entropy, "LEAST_CHUNK", size)
        monkeypatch.setattr(cross_entropy, "ALIGNED", 1)

    return set_size


def whole(case):
    """Losses and gradients by whole logits in float64, of which all is written out."""
    hidden, head, (of_nats, of_squares) = *map(np.float64, case[:2]), case.weights
    logits = hidden @ head
    total = np.exp(logits).sum(-1)
    log_sum_exp = np.log(total)
    is_target = np.arange(V) == case.targets[..., None]
    d_logits = (
        np.exp(logits) / total[..., None] * (of_nats + 2 * of_squares * log_sum_exp)[..., None]
    )
    d_logits -= is_target * of_nats[..., None]
    nats = log_sum_exp - logits[is_target].reshape(B, S)
    d_head = np.einsum("bsd,bsv->dv", hidden, d_logits)
    return nats, log_sum_exp, logits.argmax(-1) == case.targets, d_logits @ head.T, d_head


def config_of(tied):
    tiny = dataclasses.replace(PRESETS["scout"], vocab_size=V, hidden_size=D)
    return dataclasses.replace(tiny, tie_word_embeddings=tied)


def weighed(case, tied, hidden, head):
    """The scalar that gradients are taken of, and the losses."""
    params = {"embed" if tied else "lm_head": head}
    found = token_losses(config_of(tied), params, hidden, jnp.asarray(case.targets))
    of_nats, of_squares = case.weights
    return (of_nats * found.nats + of_squares * found.log_sum_exp**2).sum(), found


def in_chunks(case, tied=False, mesh=None, dtype="float32"):
    """What `whole` returns, by `token_losses`; on a mesh with a padded vocabulary."""
    axes = ("vocab", "embed") if tied else ("embed", "vocab")
    head = jnp.asarray(case.head.T if tied else case.head, dtype)
    if mesh is not None:
        shape = meshes.padded_shape(head.shape, axes, mesh)
        padding = [(0, n - had) for n, had in zip(shape, head.shape, strict=True)]
        head = jnp.pad(head, padding, constant_values=5.0)
        head = jax.device_put(head, meshes.sharding(mesh, meshes.param_spec(axes)))

    def run(hidden, head):
        gradient = jax.grad(lambda *x: weighed(case, tied, *x), argnums=(0, 1), has_aux=True)
        return gradient(hidden, head)

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        (d_hidden, d_head), found = jax.jit(run)(jnp.asarray(case.hidden, dtype), head)
    assert d_head.dtype == head.dtype and d_head.sharding.is_equivalent_to(head.sharding, 2)
    d_head = np.asarray(d_head.T if tied else d_head, "float32")
    assert not d_head[:, V:].any()
    return *found, d_hidden, d_head[:, :V]


def check(found, wanted, tolerance=1e-6):
    """Equal to the tolerance times the largest magnitude of each array."""
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.float64(one) - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 7, 50, 100, 101, 2000])
def test_chunked_equals_whole(case, chunk, size, tied):
    chunk(size)
    check(in_chunks(case, tied), whole(case))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_chunked_on_a_mesh_equals_whole(case, chunk, mesh, tied):
    chunk(7)
    check(in_chunks(case, tied, MeshConfig.parse(mesh).make()), whole(case))


def test_a_gradient_in_bfloat16_is_summed_in_float32(case, chunk):
    """It differs from that of the rounded inputs by roundings of one addend and of the sum."""
    chunk(13)
    rounded = case._replace(
        hidden=np.float32(jnp.asarray(case.hidden, "bfloat16")),
        head=np.float32(jnp.asarray(case.head, "bfloat16")),
    )
    mesh = MeshConfig.parse("data=2,fsdp=2,tensor=2").make()
    found, wanted = in_chunks(case, mesh=mesh, dtype="bfloat16"), whole(rounded)
    check(found[:3], wanted[:3])
    check(found[3:], wanted[3:], 2**-8)


def test_a_tie_counts_as_right():
    config = config_of(tied=False)
    found = token_losses(
        config, {"lm_head": jnp.zeros((D, V))}, jnp.ones((1, 1, D)), jnp.full((1, 1), 5)
    )
    assert found.right.all()
    np.testing.assert_allclose(found.nats, math.log(V), rtol=1e-6)


def test_a_frozen_head_has_no_gradient_computed(case):
    """One product forward, two backward, where a trained head has three."""

    def products(*argnums):
        gradient = jax.grad(lambda *x: weighed(case, False, *x)[0], argnums=argnums)
        return str(jax.make_jaxpr(gradient)(case.hidden, case.head)).count("dot_general")

    assert (products(0), products(0, 1)) == (3, 4)


def loss_memory(spec, devices, *, trained, tied=False, **compiling):
    """The compiler's analysis of Scout's loss and gradient, 8,192 tokens a device in bfloat16."""
    config = dataclasses.replace(PRESETS["scout"], tie_word_embeddings=tied)
    sizes = MeshConfig.parse(spec)
    mesh = sizes.make(devices(math.prod(dataclasses.astuple(sizes))))
    embed, length = config.hidden_size, 8192 * sizes.sequence
    rows = sizes.data * sizes.fsdp * sizes.expert
    name, axes = ("embed", ("vocab", "embed")) if tied else ("lm_head", ("embed", "vocab"))

    def argument(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.sharding(mesh, spec))

    def loss(hidden, head, targets):
        found = token_losses(config, {name: head}, hidden, targets)
        return found.nats.mean() + 1e-4 * (found.log_sum_exp**2).mean()

    places = meshes.activation_spec(mesh, ("batch", "length"), (rows, length))
    shape = (config.vocab_size, embed) if tied else (embed, config.vocab_size)
    arguments = (
        argument((rows, length, embed), jnp.bfloat16, places),
        argument(shape, jnp.bfloat16, meshes.param_spec(axes)),
        argument((rows, length), jnp.int32, places),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1) if trained else 0))
        platform = {"lowering_platforms": ("cuda",)} if compiling else {}
        lowered = gradient.trace(*arguments).lower(**platform)
    return lowered.compile(compiling or None).memory_analysis()


@pytest.mark.absent_gpu
@pytest.mark.parametrize(
    ("spec", "trained"),
    [
        ("data=1", False),
        ("data=1", True),
        ("fsdp=8", False),
        ("fsdp=4,tensor=2", True),
        ("expert=4,sequence=2", True),
    ],
)
def test_temporaries_on_h100s(spec, trained):
    """Half a gigabyte, beside the gradients: a frozen head has none, a trained one is kept once."""
    memory = loss_memory(spec, absent_h100s, trained=trained, **compiler_options())
    assert memory.temp_size_in_bytes < 0.5e9
    sizes = MeshConfig.parse(spec)
    head = 2 * 5120 * 202048 // (sizes.fsdp * sizes.tensor)
    gradients = 2 * 8192 * 5120 + (head if trained else 0)
    assert memory.output_size_in_bytes == pytest.approx(gradients, rel=0.01)


@pytest.mark.reads_compiled
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_temporaries_on_the_cpu(trained, tied):
    memory = loss_memory("data=1", lambda n: jax.devices()[:n], trained=trained, tied=tied)
    assert memory.temp_size_in_bytes < 0.8e9
