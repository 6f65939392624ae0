"""Equal to transformers: every golden file, by every path. The files are named after the mistakes
that other implementations make; `tests/test_reference.py` shows that each file sees its mistake.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from tests import tiny
from tests.conftest import load_tiny, one_device
from tests.tiers import slow_after_first

TOLERANCE = 1e-4
ROOT = Path(__file__).parents[2]


def load_golden(name, tmp_path):
    golden = tiny.read_golden(name)
    return golden, load_tiny(tmp_path, golden.config, golden.tensors())


@pytest.mark.parametrize("name", tiny.golden_names())
def test_full_forward(name, tmp_path):
    golden, model = load_golden(name, tmp_path)
    logits = token_logits(model.config, model.params, golden.tokens)[:, golden.first_row :]
    assert abs(logits - golden.logits).max() < TOLERANCE


@pytest.mark.parametrize("name", ["scout", "maverick"])
@pytest.mark.parametrize("chunk", slow_after_first([None, 7]), ids=["one prefill", "chunks"])
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


@pytest.mark.parametrize("name", slow_after_first(["maverick", "scout"]))
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


@pytest.mark.slow
def test_programs_that_users_get():
    """Compiled without tests/conftest.py's flags: a forward pass, a prefill and decode steps."""
    tests = "test_full_forward[maverick]", "test_prefill_and_decode[one prefill-scout]"
    ids = [f"tests/model/test_golden.py::{test}" for test in tests]
    left_out = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "PYTEST_XDIST_WORKER")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    env |= {"JAXMOE_FULL_COMPILATION": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ids]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
