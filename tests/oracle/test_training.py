"""The loss of a step and all of its gradients are those of transformers: `make oracle`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.mapping import names
from jaxmoe.checkpoint.mapping.tensors import array_shapes, expand
from jaxmoe.model.params import named_params
from jaxmoe.train.data import Batch
from jaxmoe.train.loss import next_token_loss
from tests import tiny
from tests.conftest import load_tiny

pytestmark = pytest.mark.oracle

LIKE = {"scout": tiny.scout_like, "maverick": tiny.maverick_like}
LENGTHS = [[23, 41], [60], [5, 17, 30]]  # of each row's documents; a chunk is 16 tokens
LENGTH = 64


@pytest.fixture(scope="module", params=LIKE)
def model(request, tmp_path_factory):
    """Three local layers and a global one; in Maverick's likeness two of them are dense."""
    config = LIKE[request.param](num_hidden_layers=4)
    folder = tmp_path_factory.mktemp(request.param)
    return load_tiny(folder, config, tiny.random_tensors(config, 6)), folder / "hf"


def packed(masked):
    """Rows of documents with padding after them, and which tokens are learned."""
    rng = np.random.default_rng(8)
    segment_ids = np.zeros((len(LENGTHS), LENGTH), np.int32)
    for row, lengths in enumerate(LENGTHS):
        ids = np.repeat(np.arange(len(lengths)) + 1, lengths)
        segment_ids[row, : len(ids)] = ids
    tokens = rng.integers(0, 120, segment_ids.shape, np.int32)
    turns = np.arange(LENGTH) // 7 % 2 == 0
    return Batch(tokens, segment_ids, np.broadcast_to(turns, tokens.shape) if masked else None)


def by_parameter(model, tensors):
    """Gradients of stored tensors in the shapes of this project's parameters."""
    params = named_params(model.config, model.params).items()
    found = {name: np.full(w.shape, np.nan, np.float32) for name, (_, w) in params}
    rows = names.TEXT + names.FUSED + names.LAST
    for group in expand(rows, array_shapes(model.config, {})):
        for block in group.blocks(itemsize=4):
            flat = tensors[block.tensor].reshape(-1)[block.start : block.start + block.count]
            parts = group.layout.split(flat, block.shape)
            for name, part in zip(group.params, parts, strict=True):
                found[name][block.index] = part
    return found


@pytest.mark.parametrize("masked, z_loss", [(False, 0.0), (True, 0.0), (True, 0.01)])
def test_loss_and_gradients_of_packed_rows(model, ask_oracle, tmp_path, masked, z_loss):
    """Each document as if alone: transformers reads them one by one, with labels of -100."""
    tiny_model, checkpoint = model
    batch = packed(masked)
    labels = batch.tokens if batch.learned is None else np.where(batch.learned, batch.tokens, -100)
    request = {"checkpoint": str(checkpoint), "training": str(tmp_path / "in.npz")}
    request |= {"z_loss": z_loss, "output": str(tmp_path / "out.npz")}
    np.savez(request["training"], batch.tokens, batch.segment_ids, labels)
    ask_oracle(request)
    with np.load(request["output"]) as file:
        theirs = dict(file)

    loss = next_token_loss(z_loss=z_loss)
    run = jax.jit(jax.value_and_grad(lambda p, b: loss(tiny_model.config, p, b), has_aux=True))
    rows = Batch(*(None if x is None else jnp.asarray(x) for x in batch))
    (ours, _), gradient = run(tiny_model.params, rows)
    assert abs(ours - theirs.pop("loss")) < 1e-5
    wanted = by_parameter(tiny_model, theirs)
    for name, (_, found) in named_params(tiny_model.config, gradient).items():
        scale = abs(wanted[name]).max()
        assert scale > 0 and abs(found - wanted[name]).max() < 1e-5 * scale, name
