"""How often kernels of a chunk of prefill run their hot loops, without a compiler."""

import dataclasses

import pytest

from jaxmoe.benchmarks.schedule.tpu_prefill import Chunk
from jaxmoe.config import PRESETS
from jaxmoe.plan.targets import parse_target
from pallas_kernels.compile.paths import whole
from tests.pallas_kernels.compile.masked_sums import recorded
from tests.pallas_kernels.compile.test_bundles import branch, code

pytestmark = pytest.mark.absent_tpu

SCOUT = PRESETS["scout"]
CONFIG = dataclasses.replace(SCOUT, layers=SCOUT.layers[:4], attention_chunk_size=2048)
CHUNK = Chunk(CONFIG, 4096, 1024, "int8", parse_target("v5p-8"))
STEADY, MASKED = 65, 67  # bundles of the recorded kernel's paths
PAGE = 128
UNIT = 8  # a pool's pages, one of which is the null page, are a multiple


def paged(pages, chunk=CHUNK):
    """Bundles of attention to a pool of so many pages; its blocks fit those of the recorded one."""
    shapes = [(2,), (1, 1, 5, chunk.tokens, 16), (pages, 1, PAGE, 16), (pages, PAGE)]
    return chunk.hot_bundles("paged_attention.3", recorded(), shapes)


def test_visits_of_a_full_cache():
    """Tiles of 256 queries visit blocks of 512 keys: 7, 7, 8 and 8, the last of each masked."""
    assert paged(4096 // PAGE + UNIT) == (7 + 8 - 2) * STEADY + 2 * MASKED


def test_visits_of_a_ring():
    """The chunk that began before has 1,024 tokens, which are two blocks without a mask."""
    assert paged(2048 // PAGE + UNIT) == 2 * 2 * STEADY


def test_the_core_with_most_visits_counts():
    """The first core has the first and the last of three tiles, of 7, 7 and 8 blocks."""
    chunk = dataclasses.replace(CHUNK, context=4096 - 256, tokens=768)
    assert paged(3840 // PAGE + 2, chunk) == (7 + 8 - 2) * STEADY + 2 * MASKED


def test_a_pool_of_no_cache():
    with pytest.raises(ValueError, match="has 18 pages"):
        paged(18)


def attention_of_blocks(trips):
    """A loop that copies in each iteration, and multiplies or not: 12 bundles or 9."""
    return code(
        "%s1_s0 = smov 0",
        "%s2_s1 = sphi %s1_s0, %s3_s2  ;;  %s3_s2 = sadd.s32 1, %s2_s1 @ 5",
        "%1 = dma.hbm_to_vmem /*hbm=*/%s1, /*size_in_granules=*/2, x",
        *branch(6, "%p2_p0"),
        *["%2 = vmatmul.bf16 %v1"] * 3,
        f"%p4_p1 = scmp.ge.s32.totalorder %s3_s2, {trips} @ 6",
        *branch(5, "!%p4_p1"),
        "end",
    )


def test_blocks_of_scores_that_splash_computes():
    """3 heads of 5 for the first core, each with 10 of 4 x 4 blocks in a grid of 48 and 2 more."""
    kernel = attention_of_blocks(50)
    (loop,) = whole(kernel).inner
    longest, idle = loop.longest.work.bundles, loop.longest_idle.work.bundles
    assert longest == idle + 3
    config = dataclasses.replace(CONFIG, attention_chunk_size=8192)
    chunk = dataclasses.replace(CHUNK, config=config, context=8192, tokens=4096)
    shapes = [(1, 4, 4), (5, 4096, 128), (1, 4096, 128), (1, 4096, 128), (4096, 128)]
    bundles = chunk.hot_bundles("splash_mha_fwd_residuals.1", kernel, shapes)
    assert bundles == 30 * longest + 20 * idle


@pytest.mark.parametrize(
    ("inputs", "outputs", "matrices", "iterations"),
    [(5120, 1024, 2, 8 // 2 * 80), (1024, 5120, 1, 10 // 2 * 80)],
)
def test_tiles_of_experts(inputs, outputs, matrices, iterations):
    """Gate and up by 128 outputs and down by 512, half of them for each core, of all blocks."""
    weights = [(16, inputs, outputs)] * matrices
    shapes = [(), (80,), (80, 128, inputs), *weights, (80, 128, 128)]
    (loop,) = whole(recorded()).inner
    bundles = CHUNK.hot_bundles("grouped_matmul.4.x", recorded(), shapes)
    assert bundles == iterations * loop.longest.work.bundles


def test_others_have_no_rule():
    assert CHUNK.hot_bundles("fusion.251", recorded(), []) is None
