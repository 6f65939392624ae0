"""In decode's PTX, the two warpgroups write shared memory apart, or with a barrier between them."""

import itertools
import re

import pytest

from pallas_kernels.compile import assembler
from pallas_kernels.compile.absent import absent_h100s, compiler_options, lower_for
from tests.pallas_kernels.test_absent_gpu import decode, decode_arguments

pytestmark = pytest.mark.absent_gpu

INSTRUCTION = re.compile(r"(?:@\S+ )?([a-z][\w.:]*)\s+(\{?%\w+[^;]*);")
WRITE = re.compile(r"(?:@\S+ )?(?:st\.shared|stmatrix).*\[(%\w+)")
OF_WARPGROUP = re.compile(r"shr\.[us]32\s+%\w+, %\w+, 7;")  # the thread's number over 128
NO_RESULT = "st.", "bar", "cp.", "mbarrier", "wgmma", "red"


def ptx_of_decode(format):
    """Lines of the kernel for one query a row."""
    queries, caches = decode_arguments(format, 128)
    lowered = lower_for(*absent_h100s(1), decode, queries[:1], caches[:1])
    assembler._make_unique(lowered)
    with assembler._dumping("MOSAIC_GPU_DUMP_PTX"), assembler._captured() as output:
        lowered.compile(compiler_options())
    text = output[0][output[0].index(".entry decode_attention") :]
    return [line.strip() for line in text.partition(".entry decode_join")[0].splitlines()]


def depends_on_warpgroup(register, made_by, seen):
    """Whether the warpgroup's index is among what a register is computed from."""
    for line, sources in made_by.get(register, []):
        if OF_WARPGROUP.search(line):
            return True
        if line not in seen:
            seen.add(line)
            if any(depends_on_warpgroup(source, made_by, seen) for source in sources):
                return True
    return False


@pytest.mark.parametrize("format", ["bfloat16", "int4"])
def test_no_memory_is_written_by_both_warpgroups_at_once(format):
    """Catches JAX's reductions, whose scratch is at one place: see `ColumnReduction`."""
    lines, made_by = ptx_of_decode(format), {}
    for line in lines:
        found = INSTRUCTION.match(line)
        if found and not found[1].startswith(NO_RESULT):
            result, *sources = re.findall(r"%[\w.]+", found[2])
            made_by.setdefault(result, []).append((line, sources))
    writes = [(i, found[1]) for i, line in enumerate(lines) if (found := WRITE.match(line))]
    shared = [i for i, register in writes if not depends_on_warpgroup(register, made_by, set())]
    assert 0 < len(shared) < len(writes)
    gaps = list(itertools.pairwise(shared))
    first, second = max(gaps, key=lambda gap: gap[1] - gap[0])  # one's results, both's results
    between = [line.partition(" ")[0] for line in lines[first:second]]
    arrives = [i for i, name in enumerate(between) if name.startswith("mbarrier.arrive")]
    waits = [i for i, name in enumerate(between) if name.startswith("mbarrier.try_wait")]
    assert arrives and waits and arrives[0] < waits[-1]
    for begin, end in gaps:  # what one warpgroup writes, it writes without others between
        assert (begin, end) == (first, second) or not any(
            line.startswith("mbarrier") for line in lines[begin:end]
        )
