"""Conversions that are killed at random times resume, with the same result to the byte.

`JAXMOE_KILLS=25` kills more often, `JAXMOE_KILL_SEED` repeats a run.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmoe.checkpoint.convert import convert
from tests import formats, tiny
from tests.checkpoint.test_resume import files

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("JAXMOE_KILLS", "3"))
SEED = int(os.environ.get("JAXMOE_KILL_SEED", time.time_ns() % 10**6))
SIZES = {"num_hidden_layers": 4, "num_local_experts": 8}

CONVERT = """
import sys
from jaxmoe.checkpoint.mapping import tensors
from jaxmoe.checkpoint.zarr import arrays
arrays.CHUNK_BYTES, tensors.BLOCK_BYTES = 1000, 3000
from jaxmoe.checkpoint.convert import convert
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], weights=sys.argv[3] or None)
"""


def kill_after(seconds, source, output, weights):
    """Whether the process was killed before it ended by itself."""
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, source, output, weights or ""],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int4"])
def test_killed_at_random_times(tmp_path, small_blocks, weights):
    config = tiny.maverick_like(**SIZES)
    stored = tiny.random_tensors(config, 0)
    if weights is None:
        config, stored, _ = formats.in_fp8(config, stored)
    source = tiny.write_checkpoint(tmp_path / "hf", config, stored, shards=2)
    convert(source, tmp_path / "warm", weights=weights)
    start = time.perf_counter()
    convert(source, tmp_path / "once", weights=weights)
    seconds = time.perf_counter() - start
    expected = files(tmp_path / "once")
    print(f"JAXMOE_KILL_SEED={SEED}, {seconds:.2f} s undisturbed")
    moments = random.Random(SEED)
    killed = went_on = 0
    for i in range(KILLS):
        output = tmp_path / str(i)
        if not kill_after(moments.uniform(0, 0.9 * seconds), source, output, weights):
            continue
        killed += 1
        assert not output.exists() or files(output) == expected
        if not output.exists():
            went_on += convert(source, output, weights=weights).resumed > 0
        assert files(output) == expected, f"kill {i} of JAXMOE_KILL_SEED={SEED}"
    print(f"{killed} killed, {went_on} of them after something was noted")
    assert killed
