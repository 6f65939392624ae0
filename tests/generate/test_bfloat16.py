"""In bfloat16, what a request gets hardly depends on what runs beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.generation.engine import Engine, Request
from jaxmoe.generation.sampling import Sampling
from tests import tiny
from tests.conftest import load_tiny, one_device

SCORED = Sampling(temperature=0.0, logprobs=0)
MOST = 0.1  # of the log-probabilities: float32 sums in another order; half or all are without care


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny.scout_like(num_hidden_layers=2, no_rope_layer_interval=2)
    made = load_tiny(tmp_path_factory.mktemp("bfloat16"), config, tiny.random_tensors(config, 3))
    return made.config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), made.params)


def logprobs(model, requests, **options):
    with jax.set_mesh(one_device()):
        answers = [token.completion for token in Engine(*model, requests, **options).run()]
    return {
        answer.request.id: [(x.token, x.logprob) for x in answer.logprobs or ()]
        for answer in answers
    }


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rows": 12}, {"rows": 6, "step_tokens": 16}], ids=str)
def test_rows_and_budgets(model, options):
    """Prompts are read whole or in pieces, across chunks of 16 tokens, and beside others or not."""
    rng = np.random.default_rng(0)
    requests = [
        Request(i, tuple(rng.integers(0, 120, rng.integers(2, 60)).tolist()), 12, SCORED)
        for i in range(12)
    ]
    want = logprobs(model, requests, rows=6, step_tokens=512, stop_ids=())
    got = logprobs(model, requests, **{"step_tokens": 512} | options, stop_ids=())
    pairs = [pair for i in want for pair in zip(want[i], got[i], strict=True)]
    assert len(pairs) == 144
    assert sum(x != y for x, y in pairs) <= MOST * len(pairs)
