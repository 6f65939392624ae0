"""What the flash kernels compute while the tensor cores work, read from their machine code."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import flash_attention
from pallas_kernels.compile.absent import absent_h100s, compiler_options, lower_for

pytestmark = pytest.mark.absent_gpu

WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)")
SCALE = 0.12345  # nobody else's: Mosaic GPU assembles a kernel that it has met no second time


@pytest.fixture(scope="module", params=[64, 128], ids=lambda d: f"heads of {d}")
def code(request, tmp_path_factory):
    """The machine code of the three kernels by name."""

    def gradients(q, k, v):
        out, transpose = jax.vjp(lambda *qkv: flash_attention(*qkv, scale=SCALE), q, k, v)
        return transpose(out)

    folder = tmp_path_factory.mktemp("sass")
    q = jax.ShapeDtypeStruct((1, 2, 512, request.param), jnp.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
        lower_for(absent_h100s(1)[0], gradients, q, q, q).compile(compiler_options())
    return {path.name.split("_")[2]: path.read_text() for path in folder.glob("**/*.sass_ctrl")}


def between_waits(code):
    """What is between each wait for products and the next, and how many products may still run."""
    _, *parts = WAIT.split(code)
    return list(zip(map(int, parts[::2]), parts[1::2], strict=True))


def exponentials(code):
    return code.count("MUFU.EX2")


def test_softmax_runs_under_the_product_with_values(code):
    """A thread has 64 scores of a block, and two maxima, which may come later under a mask."""
    parts = between_waits(code["forward"])
    masked, unmasked = (exponentials(part) for running, part in parts if running)
    assert masked >= 64 and unmasked == 66


@pytest.mark.parametrize("kernel", ["dq", "dkv"])
def test_probabilities_are_computed_under_the_second_product(code, kernel):
    """In the loop without a mask, of 32 a step; a few may lie before it or after it."""
    under = [
        exponentials(part[part.index("HGMMA") :])
        for _, part in between_waits(code[kernel])
        if exponentials(part)
    ]
    _, unmasked, *_ = under
    assert unmasked >= 28
