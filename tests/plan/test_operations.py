"""Device operations of compiled programs are counted and assigned to their layers."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.model.transformer import forward
from jaxmoe.plan.operations import (
    Operation,
    count_kinds,
    entry_operations,
    marginal_operations,
    of_layer,
)

pytestmark = pytest.mark.reads_compiled

ROOT = Path(__file__).parents[2]
TEXT = f"""\
HloModule jit_step, is_scheduled=true

FileNames
1 "{ROOT}/jaxmoe/model/layers.py"
2 "/elsewhere/other.py"

FunctionNames
1 "rms_norm"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=47 end_line=47 column=12 end_column=12}}
2 {{file_name_id=2 function_name_id=1 line=9 end_line=9 column=12 end_column=12}}

StackFrames
1 {{file_location_id=2 parent_frame_id=1}}
2 {{file_location_id=1 parent_frame_id=2}}

%fused_sum (param_0: f32[8]) -> f32[] {{
  %param_0 = f32[8]{{0}} parameter(0)
  %zero = f32[] constant(0)
  ROOT %sum.1 = f32[] reduce(%param_0, %zero), dimensions={{0}}, to_apply=%add, \
metadata={{op_name="jit(step)/layer_0/jit(layer)/reduce_sum" stack_frame_id=2}}
}}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %arg = (s32[], f32[8]{{0}}) parameter(0)
  %element = s32[] get-tuple-element(%arg), index=0
  %next = s32[] fusion(%element), kind=kLoop, calls=%f, metadata={{op_name="jit(step)/add"}}
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%next, %element)
}}

%fused_less (param_1: s32[]) -> pred[] {{
  ROOT %less.1 = pred[] parameter(0)
}}

%condition (arg.1: (s32[], f32[8])) -> pred[] {{
  %arg.1 = (s32[], f32[8]{{0}}) parameter(0)
  ROOT %less = pred[] fusion(%arg.1), kind=kLoop, calls=%fused_less
}}

%graph (first: f32[8]) -> f32[8] {{
  %first = f32[8]{{0}} parameter(0)
  ROOT %twice = f32[8]{{0}} fusion(%first), calls=%f, metadata={{op_name="jit(step)/mul"}}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %one = s32[] constant(1)
  %view = f32[2,4]{{1,0}} bitcast(%x)
  %unnamed = f32[] fusion(%x), kind=kInput, calls=%fused_sum
  %copied = f32[8]{{0}} copy(%x)
  %ids = s32[8]{{0}} sort(%copied), dimensions={{0}}, to_apply=%compare, metadata={{op_name="sort"}}
  %all-reduce-start = ((f32[8]{{0}}), f32[8]{{0}}) all-reduce-start(%ids), to_apply=%add, \
metadata={{op_name="jit(step)/layer_12/shard_map/psum" stack_frame_id=1}}
  %all-reduce-done = f32[8]{{0}} all-reduce-done(%all-reduce-start), \
metadata={{op_name="jit(step)/layer_12/shard_map/psum"}}
  %kernel = (f32[8]{{0}}, /*index=1*/f32[8]{{0}}) custom-call(%all-reduce-done), \
custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(step)/take_rows/mpmd_map"}}
  %state = (s32[], f32[8]{{0}}) tuple(%one, %all-reduce-done)
  %loop = (s32[], f32[8]{{0}}) while(%state), condition=%condition, body=%body, \
metadata={{op_name="jit(step)/layer_0/while"}}
  ROOT %last = f32[8]{{0}} call(%kernel), to_apply=%graph
}}
"""


def test_operations_of_text():
    """Catches counted views, asynchronous pairs counted twice, and loop bodies that are counted."""
    add = Operation("fusion", "next", "jit(step)/add")
    assert entry_operations(TEXT) == [
        Operation("fusion", "unnamed", "jit(layer)/reduce_sum", 0, "jaxmoe/model/layers.py:47"),
        Operation("copy", "copied", "shard_map/psum", 12, "other.py:9"),
        Operation("sort", "ids", "shard_map/psum", 12, "other.py:9"),
        Operation("all-reduce", "all-reduce-start", "shard_map/psum", 12, "other.py:9"),
        Operation("custom-call", "kernel", "jit(step)/take_rows/mpmd_map"),
        Operation("while", "loop", "while", 0, inside=(Operation("fusion", "less"), add)),
        Operation("fusion", "twice", "jit(step)/mul"),
    ]


def test_a_branch_has_the_operations_of_all_branches():
    text = TEXT.replace(
        "while(%state), condition=%condition, body=%body",
        "conditional(%state), branch_computations={%graph, %body}",
    )
    (conditional,) = [each for each in entry_operations(text) if each.kind == "conditional"]
    assert [each.name for each in conditional.inside] == ["twice", "next"]


def test_layers_are_told_apart():
    operations = entry_operations(TEXT)
    assert count_kinds(of_layer(operations, 0)) == {"fusion": 1, "while": 1}
    assert count_kinds(of_layer(operations, 12)) == {"copy": 1, "sort": 1, "all-reduce": 1}
    assert count_kinds(of_layer(operations, None)) == {"custom-call": 1, "fusion": 1}


@jax.jit
def layer(x, w):
    """A layer with an XLA loop and a sort; all layers share exp(w)."""
    x = jax.lax.fori_loop(0, x[0, 0].astype(int), lambda _, y: jnp.sin(y), x)
    return jnp.sort(x @ jnp.exp(w))


def compile_layers(layers):
    def step(x, w):
        for i in range(layers):
            with jax.named_scope(f"layer_{i}"):
                x = layer(x, w)
        return jnp.sort(-x)

    return jax.jit(step).lower(jnp.ones((8, 8)), jnp.ones((8, 8))).compile()


def test_layers_of_a_compiled_program():
    """A layer's scope reaches the operations of an inner jitted function that is traced once."""
    operations = entry_operations(compile_layers(3))
    for i in range(3):
        counts = count_kinds(of_layer(operations, i))
        assert (counts["while"], counts["sort"]) == (1, 1)
    assert count_kinds(of_layer(operations, None))["sort"] == 1
    loop = next(each for each in operations if each.kind == "while")
    assert loop.inside and loop.source.startswith("tests/plan/test_operations.py:")


def test_marginal_operations_leave_out_what_is_shared():
    marginal = marginal_operations(compile_layers, 2)
    assert (marginal["while"], marginal["sort"]) == (1, 1)
    first, second = (len(of_layer(entry_operations(compile_layers(2)), i)) for i in range(2))
    assert sum(marginal.values()) == second < first


def test_layers_of_the_model(small):
    """Catches layers without a scope of their own, and kinds of layers traced more than once."""
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    step = jax.jit(forward, static_argnums=0)
    config = dataclasses.replace(small.config, layers=2 * small.config.layers)
    params = small.params | {"layers": 2 * small.params["layers"]}
    lowered = step.lower(config, params, tokens, tokens, tokens)
    assert lowered.as_text().count("func.func private @decoder_layer") == 2
    operations = entry_operations(lowered.compile())
    assert all(of_layer(operations, i) for i in range(len(config.layers)))
