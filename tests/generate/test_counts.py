"""Counts of a row's tokens, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.generation.counts import MOST, count, new_counts, start_counts
from jaxmoe.mesh import MeshConfig

MESHES = ("tensor=1", "tensor=8", "data=2,tensor=4")
SIZE = 30  # which 8 does not divide

start = jax.jit(start_counts, donate_argnames="counts")
add = jax.jit(count, donate_argnames="counts")


@pytest.fixture(params=MESHES)
def mesh(request):
    mesh = MeshConfig.parse(request.param)
    devices = 1 if request.param == "tensor=1" else 8
    with jax.set_mesh(mesh.make(jax.devices()[:devices])):
        yield


def ids(*values):
    return jnp.asarray(values, jnp.int32)


def test_rows_count_their_own_tokens(mesh):
    """Twice in one call, repeatedly, beside rows without a token; of a new request from 0."""
    counts = start(new_counts(3, SIZE), jnp.int32(1), ids(29, 4, 4, -1, -1))
    sharding = counts.generated.sharding
    counts = add(counts, ids(0, 1, 1, 2), ids(7, 29, 29, -1))
    counts = add(counts, ids(2, 1, 0), ids(0, 29, 7))
    want = np.zeros((3, SIZE), int)
    want[0, 7], want[1, 29], want[2, 0] = 2, 3, 1
    np.testing.assert_array_equal(counts.generated[:, :SIZE], want)
    assert np.argwhere(counts.prompt).tolist() == [[1, 4], [1, 29]]
    assert not counts.generated[:, SIZE:].any()

    counts = start(counts, jnp.int32(1), ids(3, -1, -1, -1, -1))
    want[1] = 0
    np.testing.assert_array_equal(counts.generated[:, :SIZE], want)
    assert np.argwhere(counts.prompt).tolist() == [[1, 3]]
    assert counts.generated.sharding == sharding  # another one would compile steps again


def test_counts_end_before_they_overflow():
    counts = new_counts(1, 4)
    counts = counts._replace(generated=jnp.full((1, 4), MOST - 5, jnp.int16))
    for _ in range(10):
        counts = count(counts, ids(0, 0, 0), ids(2, 2, 2))
    assert MOST - 5 < counts.generated[0, 2] <= MOST
    assert counts.generated[0, 1] == MOST - 5


@pytest.mark.parametrize("mesh_text", ["tensor=8"])
def test_each_device_has_its_part(mesh_text):
    with jax.set_mesh(MeshConfig.parse(mesh_text).make()):
        counts = new_counts(2, SIZE)
    assert counts.generated.shape == (2, 32)
    assert counts.generated.addressable_shards[0].data.shape == (2, 4)
