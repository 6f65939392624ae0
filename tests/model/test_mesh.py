"""The same answer on any mesh of eight simulated devices, and gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.errors import UserError
from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.transformer import forward, positions_of, unembed
from tests import tiny
from tests.conftest import load_tiny, one_device
from tests.tiers import slow_after_first

MESHES = [
    "expert=4,sequence=2",
    "data=2,fsdp=2,tensor=2",
]
LENGTH = 60


@pytest.fixture(scope="module")
def batch(small):
    """Eight rows, which every mesh divides."""
    tokens = np.random.default_rng(5).integers(0, small.config.vocab_size, (8, LENGTH), np.int32)
    segments = np.ones((8, LENGTH), np.int32)
    segments[1, :7], segments[2, 25:] = 0, 2
    return tokens, segments


@pytest.fixture(scope="module")
def on_one_device(small, batch):
    return token_logits(small.config, small.params, *batch), sampled(small, small.params)


def sampled(model, params):
    """Nine requests in eight rows: one row serves two."""
    prompts = [[1, 2, 3], list(range(30)), [9] * 17, *([i] * i for i in range(1, 7))]
    requests = [Request(str(i), tuple(prompt), 12) for i, prompt in enumerate(prompts)]
    written = {request.id: [] for request in requests}
    settings = Sampling(temperature=1.0, top_p=0.9, seed=4)
    for token in generate(model.config, params, requests, settings, rows=8, stop_ids=()):
        written[token.request.id].append(token.token)
    return written


def make_mesh(text):
    sizes = MeshConfig.parse(text)
    count = int(np.prod([getattr(sizes, axis) for axis in sizes.__dataclass_fields__]))
    return sizes.make(jax.devices()[:count])


@pytest.mark.parametrize("mesh", slow_after_first(MESHES[::-1]))
def test_logits_and_sampled_tokens(small, batch, on_one_device, mesh):
    logits, tokens = on_one_device
    mesh = make_mesh(mesh)
    params = small.on(mesh)
    with jax.set_mesh(mesh):
        assert abs(token_logits(small.config, params, *batch) - logits).max() < 1e-5
        assert sampled(small, params) == tokens


@pytest.mark.parametrize("mesh", ["sequence=8", "expert=2,sequence=2,tensor=2"])
def test_segments_and_decode(small, batch, on_one_device, mesh):
    """Prefill segments that the sequence axis does and does not divide, then single tokens."""
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        path = {"prefill_chunk": 24, "decode_from": 52}
        logits = token_logits(small.config, small.on(mesh), *batch, **path)
    assert abs(logits - on_one_device[0]).max() < 1e-5


def gradients(model, params, batch):
    tokens, segments = (jnp.asarray(x) for x in batch)

    @jax.jit
    def grad(params):
        def loss(params):
            out = forward(model.config, params, tokens, positions_of(segments), segments)
            log_p = jax.nn.log_softmax(unembed(model.config, params, out.hidden))
            return -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1).mean()

        return jax.grad(loss)(params)

    return jax.tree.map(np.asarray, grad(params))


def test_three_rows_on_eight_devices(small, batch, on_one_device):
    """Rows that the mesh does not divide are replicated."""
    mesh = make_mesh("expert=8")
    with jax.set_mesh(mesh):
        logits = token_logits(small.config, small.on(mesh), *(x[:3] for x in batch))
    assert abs(logits - on_one_device[0][:3]).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=2,expert=2,sequence=2", "data=2,expert=2,tensor=2"])
def test_gradients(small, batch, mesh):
    expected = gradients(small, small.params, batch)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        ours = gradients(small, small.on(mesh), batch)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * max(1e-2, abs(one).max()), rtol=1e-4)


@pytest.mark.parametrize("mesh", ["tensor=8", "expert=3"])
def test_mesh_that_does_not_divide_names_the_axis(small, mesh):
    with pytest.raises(UserError, match=f"{mesh} does not divide"):
        small.on(make_mesh(mesh))


@pytest.fixture(scope="module")
def prime(tmp_path_factory):
    """A vocabulary that no mesh divides, as adding tokens leaves it."""
    config = tiny.scout_like(num_hidden_layers=1, vocab_size=127)
    return load_tiny(tmp_path_factory.mktemp("prime"), config, tiny.random_tensors(config, 3))


def test_vocabulary_that_the_mesh_does_not_divide(prime, tmp_path):
    """Filled up on the mesh only: what is computed and saved is without it."""
    batch = np.random.default_rng(6).integers(0, 127, (4, 20), np.int32), np.ones((4, 20), np.int32)
    mesh = make_mesh("fsdp=2,tensor=4")
    params = prime.on(mesh)
    assert params["embed"].shape == params["lm_head"].shape[::-1] == (128, 64)
    assert not np.asarray(params["lm_head"])[:, 127].any()
    with jax.set_mesh(mesh):
        logits = token_logits(prime.config, params, *batch)
        got = gradients(prime, params, batch)
    assert logits.shape == (4, 20, 127)
    assert abs(logits - token_logits(prime.config, prime.params, *batch)).max() < 1e-5
    expected = gradients(prime, prime.params, batch)
    np.testing.assert_allclose(got["embed"][:127], expected["embed"], atol=1e-6)
    assert not got["embed"][127:].any() and not got["lm_head"][:, 127:].any()
    store.save(tmp_path / "saved", prime.config, params)
    saved = store.load(tmp_path / "saved", one_device())[1]
    for one, other in zip(jax.tree.leaves(saved), jax.tree.leaves(prime.params), strict=True):
        np.testing.assert_array_equal(one, other)
