"""Adafactor and Muon beside what optax computes of plain matrices, and what each of them keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from optax import contrib

from jaxmoe import mesh as meshes
from jaxmoe.mesh import MeshConfig
from jaxmoe.train.config import OptimizerConfig
from jaxmoe.train.factored import scale_by_factored_moments
from jaxmoe.train.matrices import MatrixAxes, is_hidden, matrix_axes
from jaxmoe.train.muon import scale_by_orthogonal_mean
from jaxmoe.train.optimizer import MUON_SIZE, make_optimizer

CONFIG = OptimizerConfig(peak_lr=0.5, warmup_steps=0, weight_decay=0.0, clip_norm=0.0)


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def updates(optimizer, gradients):
    """The last of several updates of parameters that stay as they are."""
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state, run = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        update, state = run(gradient, state, params)
    return update


def test_which_axes_are_matrices():
    assert matrix_axes("layers.3.attention.q", 3) == MatrixAxes((0,), (1, 2))
    assert matrix_axes("layers.3.attention.o", 3) == MatrixAxes((0, 1), (2,))
    assert matrix_axes("layers.3.feed_forward.experts.down", 3) == MatrixAxes((1,), (2,))
    assert matrix_axes("vision.layers.0.attention.q.weight", 2) == MatrixAxes((0,), (1,))
    assert matrix_axes("norm", 1) is None
    assert is_hidden("layers.3.attention.q", 3) and not is_hidden("layers.3.feed_forward.router", 2)
    assert not any(map(is_hidden, ("embed", "lm_head", "norm"), (2, 2, 1)))


def test_each_expert_and_each_projection_is_factored_as_a_matrix_alone():
    """optax's own takes the two longest axes of the whole array, so each matrix goes in alone."""
    experts = [{"experts": {"down": random(3, 8, 6, seed=i)}} for i in range(3)]
    q = [{"attention": {"q": random(8, 2, 5, seed=i)}} for i in range(3)]
    ours = updates(scale_by_factored_moments(least=2), experts)["experts"]["down"]
    theirs = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.clip_by_block_rms(1.0)
    )
    for expert in range(3):
        wanted = updates(theirs, [{"w": x["experts"]["down"][expert]} for x in experts])["w"]
        np.testing.assert_allclose(ours[expert], wanted, rtol=1e-5)
    ours = updates(scale_by_factored_moments(least=2), q)["attention"]["q"]
    wanted = updates(theirs, [{"w": x["attention"]["q"].reshape(8, 10)} for x in q])["w"]
    np.testing.assert_allclose(ours.reshape(8, 10), wanted, rtol=1e-5)


def test_short_matrices_and_vectors_keep_every_moment():
    gradients = [{"router": random(200, 16, seed=i), "norm": random(4, seed=i)} for i in range(2)]
    state = scale_by_factored_moments().init(gradients[0])
    assert (state.rows["router"].shape, state.rows["norm"].shape) == ((200, 16), (4,))
    theirs = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    ours, wanted = (updates(x, gradients) for x in (scale_by_factored_moments(), theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, wanted)


def test_muon_orthogonalizes_each_matrix_alone_and_leaves_the_rest_to_adamw():
    gradient = {
        "embed": random(6, 4),
        "norm": random(4),
        "q": random(8, 2, 3),
        "experts": {"up": random(3, 4, 16)},
    }
    config = dataclasses.replace(CONFIG, name="muon")
    got, adam = (updates(make_optimizer(c, 9), [gradient]) for c in (config, CONFIG))
    for name in ("embed", "norm"):
        np.testing.assert_allclose(got[name], adam[name], rtol=1e-6)
    for one in (*got["experts"]["up"], got["q"].reshape(8, 6)):
        # Newton and Schulz's five iterations bring singular values near 1, not to it.
        size = 0.5 * MUON_SIZE * max(one.shape) ** 0.5
        values = np.linalg.svd(np.asarray(one), compute_uv=False) / size
        assert 0.5 < values.min() and values.max() < 1.5


def test_muon_is_optax_of_each_expert_which_one_device_has_whole():
    """Over three steps; a device makes one of eight experts orthogonal, and never has all."""
    gradients = [{"experts": {"up": random(8, 16, 24, seed=i)}} for i in range(3)]
    ours, axes = scale_by_orthogonal_mean(0.95, "float32"), contrib.MuonDimensionNumbers(0, 1)
    theirs = contrib.scale_by_muon(beta=0.95, weight_dimension_numbers={"w": axes})
    one_device = updates(ours, gradients)["experts"]["up"]
    for expert in range(8):
        alone = [{"w": x["experts"]["up"][expert]} for x in gradients]
        wanted = updates(theirs, alone)["w"]
        np.testing.assert_allclose(one_device[expert], wanted, rtol=1e-4, atol=1e-5)
    mesh = MeshConfig(fsdp=8).make()
    spread = jax.device_put(gradients, meshes.sharding(mesh, PartitionSpec(None, "fsdp")))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(
            updates(ours, spread)["experts"]["up"], one_device, rtol=1e-4, atol=1e-5
        )
        state = ours.init(spread[0])
        program = jax.jit(ours.update).lower(spread[0], state).compile().as_text() or ""
    assert "f32[8,16,24]" not in program and "f32[1,16,24]" in program


@pytest.mark.parametrize(
    ("name", "dtype", "per_parameter"),
    [("adamw", "float32", 8), ("adamw", "bfloat16", 6), ("muon", "float32", 4),
     ("muon", "bfloat16", 2), ("adafactor", "float32", 8 / 256)],
)  # fmt: skip
def test_bytes_that_each_optimizer_keeps(name, dtype, per_parameter):
    config = dataclasses.replace(CONFIG, name=name, moments=dtype)
    params = {"experts": {"up": jax.ShapeDtypeStruct((4, 256, 256), jnp.float32)}}
    state = jax.eval_shape(make_optimizer(config, 9).init, params)
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert nbytes == pytest.approx(per_parameter * 4 * 256 * 256, abs=32)
