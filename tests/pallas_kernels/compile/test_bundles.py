"""Bundles and paths: of a small kernel that libtpu 0.0.48 compiled, and of synthetic code."""

import collections
import re

import pytest

from pallas_kernels.compile.bundles import Work, parse_code
from pallas_kernels.compile.errors import CompilerError
from pallas_kernels.compile.paths import Needs, whole
from tests.pallas_kernels.compile.masked_sums import BLOCK, FILE, recorded

UNITS = "MXU, SALU\n 4 2\n"
SLOTS = [""] * 4  # bundles behind a branch


def code(*bundles):
    """Synthetic code; a bundle is its text, and the regions that start with it after an '@'."""
    lines = []
    for address, bundle in enumerate(bundles):
        text, _, regions = bundle.partition(" @ ")
        starts = " :: ".join(f"Start region {region}" for region in regions.split())
        lines.append(f"  {address:#x}   : > {{ {text} }} /* {starts} */")
    rows = "1 2\n" * len(bundles)
    return parse_code("\n".join(lines), f"== CAPACTIY:\n{UNITS}== UTILIZATION:\n{rows}")


def branch(region, predicate="%p1_p0"):
    return [f"%9 = sbr.rel ({predicate}) target = $region{region}", *SLOTS]


def counting(trips):
    """A loop of seven bundles that counts to a number, or to one that only a register knows."""
    return [
        "%s1_s0 = smov 0 /* copy for cssa */",
        "%s2_s1 = sphi %s1_s0, %s3_s2  ;;  %s3_s2 = sadd.s32 1, %s2_s1 @ 5",
        f"%p4_p1 = scmp.ge.s32.totalorder %s3_s2, {trips}",
        *branch(5, "!%p4_p1"),
        "end",
    ]


def test_recorded_blocks():
    """Catches branches, labels and bundles of several lines that are parsed as something else."""
    kernel = recorded()
    blocks = [kernel.address(block) for block in range(len(kernel.blocks))]
    assert blocks == [
        *[(0, 0x6), (0x7, 0x31), (0x32, 0x55), (0x56, 0x64), (0x65, 0x6C), (0x6D, 0x7D)],
        *[(0x7E, 0x83), (0x84, 0x9B), (0x9C, 0x9C)],
    ]
    followers = [(1, 8), (2, 7), (3, 4), (4,), (5, 6), (6,), (7, 2), (8,), ()]
    assert [tuple(x) for x in kernel.flow.successors] == followers
    assert kernel.flow.loops == {2: {2, 3, 4, 5, 6}}


def test_recorded_work():
    """A block of keys is copied ahead and waited for in each iteration, and multiplied once."""
    kernel = recorded()
    assert kernel.units["MXU"] == 4 and kernel.units["VLOAD:FILL"] == 3
    loop, *others = whole(kernel).inner
    assert not others and loop.trips is None
    assert (loop.total.bundles, loop.total.products) == (82, 2)
    assert (loop.total.copies, loop.total.waited) == ((BLOCK,), BLOCK)
    before = whole(kernel).works[1]
    assert before.copies == (32 * 16, 32 * 64, BLOCK)  # counts, q, the first block of keys


def test_recorded_paths():
    """Each branch with a product has a path of its own; the longest takes both."""
    (loop,) = whole(recorded()).inner
    unmasked, masked = (loop.cheapest(Needs(BLOCK, block)) for block in (3, 5))
    assert unmasked.nodes == (2, 3, 4, 6) and unmasked.work.bundles == 36 + 15 + 8 + 6
    assert masked.nodes == (2, 4, 5, 6) and masked.work.bundles == 36 + 8 + 17 + 6
    assert loop.longest.work.bundles == loop.total.bundles
    assert loop.cheapest(Needs()).nodes == (2, 4, 6)


def test_one_core():
    """The other core branches to the end of the kernel, unless its grid is parallel."""
    texts = [FILE.with_suffix(x).read_text() for x in (".bundles", ".utilization")]
    assert parse_code(*texts).on_one_core
    changed = texts[0].replace("scmp.ne.s32.totalorder %s4_s12, 0", "scmp.ne.s32 %s5_s12, 0")
    assert not parse_code(changed, texts[1]).on_one_core


@pytest.mark.parametrize("trips", [3, 12])
def test_trips_of_a_counting_loop(trips):
    once = whole(code(*counting(trips)))
    (loop,) = once.inner
    assert loop.trips == trips
    assert once.run.bundles == 1 + 7 * trips + 1
    assert once.run.uses == {"MXU": 7 * trips + 2, "SALU": 2 * (7 * trips + 2)}
    assert once.run.loops == 0


def test_trips_of_a_loop_whose_counter_is_spilled():
    """What is counted up has the name of a register that was reloaded, not that of the phi."""
    head, phi, *rest = counting(12)
    spilled = [
        head,
        "%s2_s1 = sphi %s1_s0, %s3_s2 @ 5",
        "%7 = sst [smem:[#allocation9_spill]] %s2_s1",
        "%s6_s4 = sld [smem:[#allocation9_spill]] /* phi copy */  ;;  %s3_s2 = sadd.s32 1, %s6_s4",
        *rest,
    ]
    assert phi not in spilled
    (loop,) = whole(code(*spilled)).inner
    assert loop.trips == 12
    (loop,) = whole(code(*(x.replace("9_spill]] %s2", "9_spill]] %s8") for x in spilled))).inner
    assert loop.trips is None  # the spilled register is another one


def test_a_loop_of_unknown_trips_counts_once():
    work = whole(code(*counting("%s8_s3"))).run
    assert (work.bundles, work.loops) == (9, 1)


def test_loops_in_loops():
    """The inner loop is a node of the outer one's paths, which counts all its iterations."""
    inner = counting(4)
    outer = whole(code(inner[0] + " @ 7", *inner[1:], *branch(7)))
    (loop,) = outer.inner
    assert [each.trips for each in outer.all_inner] == [None, 4]
    assert loop.longest.work.bundles == 1 + 7 * 4 + 1 + 5


def nested(number, *others):
    """The bundles of a loop of some trips, which has one of other trips in it, and so on."""
    begin, phi, *rest = counting(number)
    if not others:
        return [begin, phi, *rest]
    inner = [re.sub(r"%s|%p|region|@ ", r"\g<0>9", bundle) for bundle in nested(*others)]
    return [begin, phi, *inner, *rest]


def test_how_often_a_loop_is_entered():
    program = whole(code(*nested(2, 3, 4)))
    outer, middle, inner = program.all_inner
    assert [loop.trips for loop in (outer, middle, inner)] == [2, 3, 4]
    assert [program.entries(loop) for loop in (program, outer, middle, inner)] == [1, 1, 2, 6]
    program = whole(code(*nested(2, "%s8_s3", 4)))
    assert [program.entries(loop) for loop in program.all_inner] == [1, 2, 2]


def test_the_longest_path_that_multiplies_nothing():
    product = "%1 = vmatmul.bf16 %v1"
    program = whole(code(*branch(1), product, "", "", " @ 1", *branch(2), "", " @ 2"))
    assert program.longest.work.bundles == 16 and program.longest.work.products == 1
    assert program.longest_idle.work.bundles == 13 and program.longest_idle.work.products == 0


def test_work_of_a_bundle():
    """Catches copies of sizes in registers that count, and copies to memory."""
    work = whole(
        code(
            "%1 = dma.hbm_to_vmem [thread:$0]  (%p1), /*hbm=*/%s1, /*size_in_granules=*/64, x",
            "%2 = dma.hbm_to_smem /*hbm=*/%s1, /*size_in_granules=*/%s5_s3, x",
            "%3 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s1, /*size_in_granules=*/128, x",
            "%4 = dma.done.wait (%p1_p0), %s2_s1, 256 /* wait */  ;;  %5 = vmatmul.bf16 %v1",
            "%6 = dma.done.wait [#allocation1 + $0x1], 2  ;;  %7 = vmatmul.mubr.bf16 %v1",
            "%8 = inlined_call %s1_s0, %s2_s1 /* %fusion.7 = fusion(%copy.1) */",
        )
    ).run
    uses = collections.Counter(MXU=6, SALU=12)
    assert work == Work(6, uses, 2, (32 * 64, 0), 32 * 258, ("fusion.7",))


def test_the_cheapest_path_does_what_is_needed():
    """A path that copies nothing is cheaper, and is only taken if nothing is to be copied."""
    copy = "%1 = dma.hbm_to_vmem /*hbm=*/%s1, /*size_in_granules=*/2, x"
    wait = "%2 = dma.done.wait [#allocation1], 2"
    program = whole(code(*branch(1), copy, "", " @ 1", *branch(2), wait, "", " @ 2"))
    assert program.cheapest(Needs()).work.bundles == 12
    assert program.cheapest(Needs(64)).work.bundles == 16
    assert program.cheapest(Needs(1 << 20)).work.bundles == 16  # no path does more


def test_a_branch_behind_a_branch_is_refused():
    with pytest.raises(CompilerError, match="behind a branch"):
        _ = code(*branch(1)[:3], *branch(1), " @ 1").blocks


def test_texts_that_do_not_belong_together_are_refused():
    text = FILE.with_suffix(".utilization").read_text()
    with pytest.raises(CompilerError, match="157 bundles and the use of 156"):
        parse_code(FILE.with_suffix(".bundles").read_text(), text.rstrip().rpartition("\n")[0])
