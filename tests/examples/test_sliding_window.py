"""The fork with sliding windows against NumPy, where only the rule of who sees whom is replaced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.forks.sliding_window import with_sliding_window
from jaxmoe.errors import UserError
from jaxmoe.hf_config import to_hf
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import PAGE, init_cache, round_capacity
from jaxmoe.model.kv_cache.layout import pool_pages
from jaxmoe.model.transformer import forward, positions_of, unembed
from tests import reference

WINDOW, LENGTH = 12, 44
MESH = "expert=2,sequence=2,tensor=2"


@pytest.fixture(scope="module")
def batch(small):
    tokens = np.random.default_rng(1).integers(0, small.config.vocab_size, (2, LENGTH), np.int32)
    segments = np.ones_like(tokens)
    segments[1, :3], segments[1, 20:] = 0, 2
    return tokens, segments


@pytest.fixture(scope="module")
def expected(small, batch):
    """From a dense mask by the definition of a window."""
    seen_by_chunks = reference.visible

    def visible(config, local, positions, segments):
        seen = seen_by_chunks(config, False, positions, segments)
        near = positions[:, :, None] - positions[:, None, :] < WINDOW
        return seen & near if local else seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "visible", visible)
        return reference.logits(small.hf_config, small.tensors, *batch)


@functools.partial(jax.jit, static_argnums=0)
def step(config, params, tokens, positions, segments, cache):
    out = forward(config, params, tokens, positions, segments, cache)
    return unembed(config, params, out.hidden), out.cache


def logits(config, params, batch, ends):
    """Through a cache whose steps end at `ends`; without a cache if there are none."""
    tokens, segments = map(jnp.asarray, batch)
    inputs = tokens, positions_of(segments), segments
    if not ends:
        return np.asarray(step(config, params, *inputs, None)[0])
    cache, parts = init_cache(config, len(tokens), round_capacity(LENGTH)), []
    for start, stop in zip([0, *ends], ends, strict=False):
        part, cache = step(config, params, *(x[:, start:stop] for x in inputs), cache)
        parts.append(np.asarray(part))
    return np.concatenate(parts, axis=1)


PATHS = {
    "no cache": [],
    "one step": [LENGTH],
    "steps longer and shorter than a window": [16, 20, 36, *range(37, LENGTH + 1)],
}


@pytest.mark.slow
@pytest.mark.parametrize("ends", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("mesh", [None, MESH])
def test_logits_are_those_of_a_dense_window(small, batch, expected, mesh, ends):
    """Catches a key too many or too few, and one whose slot in the ring was taken too early."""
    config = with_sliding_window(small.config, WINDOW)
    if mesh is None:
        ours = logits(config, small.params, batch, ends)
    else:
        mesh = MeshConfig.parse(mesh).make()
        with jax.set_mesh(mesh):
            ours = logits(config, small.on(mesh), batch, ends)
    real = batch[1] != 0
    assert abs(ours - expected)[real].max() < 1e-4


def test_a_row_keeps_one_window(small):
    """Also of a long row: local layers' pages do not grow with the capacity."""
    cache = init_cache(with_sliding_window(small.config, WINDOW), 2, 4096)
    tokens = [layer.k.shape[0] * layer.k.shape[2] for layer in cache.layers]
    rows = {"local": (2, WINDOW), "global": (2 * 4096 // PAGE, PAGE)}  # pages of two rows, tokens
    held = {kind: pool_pages(pages) * size for kind, (pages, size) in rows.items()}
    assert tokens == [held[kind.attention] for kind in small.config.layers]
    assert {kind.attention for kind in small.config.layers} == set(held)


def test_a_checkpoint_cannot_say_it(small):
    with pytest.raises(UserError, match=r"layer 0 .*config\.json has no name"):
        to_hf(with_sliding_window(small.config, WINDOW), "float32")
