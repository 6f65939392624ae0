"""Bytes of operations, by synthetic HLO."""

import pytest

from jaxmoe.plan.traffic import Traffic

TEXT = """\
HloModule jit_step, is_scheduled=true

%cuts (param_0: bf16[64,128], param_1: s32[], param_2: f32[8]) -> f32[8] {
  %param_0 = bf16[64,128]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %param_2 = f32[8]{0} parameter(2)
  %view = bf16[64,128]{1,0} bitcast(%param_0)
  %row = bf16[1,128]{1,0} dynamic-slice(%view, %param_1, %param_1), dynamic_slice_sizes={1,128}
  ROOT %sum = f32[8]{0} add(%row, %param_2)
}

%replaces (param_3: s8[64,128], param_4: s8[1,128], param_5: s32[]) -> s8[64,128] {
  %param_3 = s8[64,128]{1,0} parameter(0)
  %param_4 = s8[1,128]{1,0} parameter(1)
  %param_5 = s32[] parameter(2)
  %pool_view = s8[64,128]{1,0} bitcast(%param_3)
  %twice = s8[1,128]{1,0} add(%param_4, %param_4)
  ROOT %new = s8[64,128]{1,0} dynamic-update-slice(%pool_view, %twice, %param_5, %param_5)
}

%reads_twice (param_6: bf16[64,128]) -> bf16[64,128] {
  %param_6 = bf16[64,128]{1,0} parameter(0)
  %part = bf16[1,128]{1,0} slice(%param_6), slice={[0:1], [0:128]}
  ROOT %all = bf16[64,128]{1,0} add(%param_6, %part)
}

ENTRY %main (x: bf16[64,128], pool: s8[64,128], experts: bf16[16,8,128]) -> f32[8] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %pool = s8[64,128]{1,0} parameter(1), metadata={op_name="cache.layers[0].k.qvalue"}
  %experts = bf16[16,8,128]{2,1,0} parameter(2), metadata={op_name="params[\\'experts\\']"}
  %one = s32[] constant(1)
  %chip = f32[8]{0:T(128)S(1)} broadcast(%one), dimensions={}
  %cut = f32[8]{0} fusion(%x, %one, %chip), kind=kLoop, calls=%cuts
  %update = s8[1,128]{1,0} slice(%pool), slice={[0:1], [0:128]}
  %written = s8[64,128]{1,0} fusion(%pool, %update, %one), kind=kLoop, calls=%replaces
  %read = bf16[64,128]{1,0} fusion(%x), kind=kLoop, calls=%reads_twice
  %set = s8[64,128]{1,0} dynamic-update-slice(%written, %update, %one, %one)
  %copy-start = (bf16[64,128]{1,0:S(1)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[64,128]{1,0:S(1)} copy-done(%copy-start)
  %slice-start = ((bf16[64,128]{1,0}), bf16[16,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)
  %view.1 = bf16[16,8,128]{2,1,0} bitcast(%experts)
  %kernel = (f32[8]{0}, /*index=1*/s8[64,128]{1,0}, f32[8]{0:S(1)}) custom-call(%view.1, %set, \
/*index=2*/%copy-done), custom_call_target="tpu_custom_call", \
output_to_operand_aliasing={{1}: (1, {})}, metadata={op_name="jit(step)/kernel"}
  ROOT %last = f32[8]{0} copy(%cut)
}
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cut", 2 * 128 + 4 + 4 * 8),  # a row, its number, the result; the sum's other part is near
        ("written", 128 + 4 + 2 * 128),  # the new row, its number, and the row written in place
        ("read", 2 * 2 * 64 * 128),
        ("update", 2 * 128),
        ("set", 2 * 128),
        ("copy-start", 2 * 64 * 128),
        ("slice-start", 2 * 16 * 128),
        ("kernel", 2 * 16 * 8 * 128 + 4 * 8),  # neither the pool, in place, nor what is on chip
        ("last", 2 * 4 * 8),
    ],
)
def test_bytes(name, expected):
    """Catches arrays that count whole although parts of them are read or written."""
    assert Traffic(TEXT).of(name) == expected


def test_what_is_on_chip_may_count():
    traffic = Traffic(TEXT, on_chip=True)
    assert traffic.of("kernel") == 2 * 16 * 8 * 128 + 2 * 64 * 128 + 2 * 4 * 8
    assert traffic.of("copy-start") == 2 * 2 * 64 * 128 + 4


def test_shares_are_of_what_kernels_read():
    """A kernel reads few experts; a copy of them all would count whole."""
    seen = []

    def share(name):
        seen.append(name)
        return 1 / 16 if "['experts']" in name else 1.0

    traffic = Traffic(TEXT, share)
    assert traffic.of("kernel") == 2 * 8 * 128 + 4 * 8
    assert seen == ["params['experts']", "x"]
    assert traffic.of("read") == 2 * 2 * 64 * 128
    assert len(seen) == 2


def test_parameters_and_moved_arrays():
    traffic = Traffic(TEXT)
    assert traffic.parameters() == {
        "x": 2 * 64 * 128,
        "cache.layers[0].k.qvalue": 64 * 128,
        "params['experts']": 2 * 16 * 8 * 128,
    }
    assert traffic.moved("copy-start") == [2 * 64 * 128] * 2 + [4]


def test_shapes_of_operands():
    assert Traffic(TEXT).operand_shapes("kernel") == [(16, 8, 128), (64, 128), (64, 128)]
    assert Traffic(TEXT).operand_shapes("cut") == [(64, 128), (), (8,)]
    assert not Traffic(TEXT).operand_shapes("copy-done")  # which is of three arrays
