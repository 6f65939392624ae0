"""Equal to transformers: every golden file, by every path. The files are named after the mistakes
that other implementations make; `tests/test_reference.py` shows that each file sees its mistake.
"""

import jax
import numpy as np
import pytest

from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from tests import tiny
from tests.conftest import load_tiny, one_device

TOLERANCE = 1e-4


def load_golden(name, tmp_path):
    golden = tiny.read_golden(name)
    return golden, load_tiny(tmp_path, golden.config, golden.tensors())


@pytest.mark.parametrize("name", tiny.golden_names())
def test_full_forward(name, tmp_path):
    golden, model = load_golden(name, tmp_path)
    logits = token_logits(model.config, model.params, golden.tokens)[:, golden.first_row :]
    assert abs(logits - golden.logits).max() < TOLERANCE


@pytest.mark.parametrize("name", ["scout", "maverick"])
@pytest.mark.parametrize("chunk", [None, 7], ids=["one prefill", "chunks"])
def test_prefill_and_decode(name, chunk, tmp_path):
    golden, model = load_golden(name, tmp_path)
    logits = token_logits(
        model.config,
        model.params,
        golden.tokens,
        decode_from=golden.decode_from,
        prefill_chunk=chunk,
    )
    assert abs(logits[:, golden.decode_from :] - golden.decode_logits).max() < TOLERANCE
    assert abs(logits[:, golden.first_row :] - golden.logits).max() < TOLERANCE


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_greedy_continuation(name, tmp_path):
    golden, model = load_golden(name, tmp_path)
    new = golden.greedy.shape[1]
    requests = [
        Request(str(i), tuple(row[: golden.prompt].tolist()), new)
        for i, row in enumerate(golden.tokens)
    ]
    written = {request.id: [] for request in requests}
    with jax.set_mesh(one_device()):
        for token in generate(
            model.config, model.params, requests, Sampling(temperature=0.0), stop_ids=()
        ):
            written[token.request.id].append(token.token)
    np.testing.assert_array_equal(list(written.values()), golden.greedy)
