"""The Hopper kernels at Llama 4's sizes, compiled for H100s and H200s that are not there."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from jaxmoe.mesh import MeshConfig, activation_spec, per_device, sharding
from pallas_kernels import ptxas
from pallas_kernels.attention import (
    Coords,
    decode_attention,
    decode_implementation,
    flash_attention,
    flash_implementation,
)
from pallas_kernels.attention.flash_mosaic import FlashMosaicConfig
from pallas_kernels.attention.mosaic_backward import BackwardConfig
from pallas_kernels.compile.absent import (
    absent_h100s,
    absent_h200s,
    compiler_options,
    lower_for,
    mesh_of,
)
from pallas_kernels.compile.assembler import assembler_reports
from pallas_kernels.quantized import LARGEST, quantize

pytestmark = pytest.mark.absent_gpu

DEVICES = {"h100": absent_h100s, "h200": absent_h200s}
TUNED = Path(pallas_kernels.__file__).parent / "tuned"
H100, H200 = (
    json.loads((TUNED / f"nvidia-{name}.json").read_text()) | {"device": None}
    for name in ("h100-80gb-hbm3", "h200")
)
# Both have one instruction set: the same configs are the same kernels.
TUNED_APART = ["h100"] if H100 == H200 else [*DEVICES]
HEADS, KV_HEADS, CHUNK, LONG = 40, 8, 8192, 131072
SHARD = 10_027_008 // 8  # of keys: ten million over eight devices
TEMPORARY = 64 * 2**20  # bytes; the scores of 8192 tokens alone are 10 GiB
FORWARD, DQ, DKV, DECODE, JOIN = (
    f"{name}_mosaic_gpu_kernel"
    for name in (
        "flash_attention_forward",
        "flash_attention_dq",
        "flash_attention_dkv",
        "decode_attention",
        "decode_join",
    )
)
COLLECTIVE = re.compile("all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute")


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def coords(rows, tokens):
    return Coords(*[shaped(rows, tokens, dtype=jnp.int32)] * 2)


def prefill(head_dim, queries, keys):
    """q, k, v, and the coordinates of queries and of keys, which are data."""
    q = shaped(1, HEADS, queries, head_dim)
    kv = shaped(1, KV_HEADS, keys, head_dim)
    return q, kv, kv, coords(1, queries), coords(1, keys)


def attend(q, k, v, q_coords, k_coords, **options):
    return flash_attention(q, k, v, q_coords, k_coords, scale=q.shape[-1] ** -0.5, **options)


def gradients(q, k, v, q_coords, k_coords, **options):
    """Stands in for a layer's backward pass; the cotangent is q."""

    def attended(*qkv):
        return attend(*qkv, q_coords, k_coords, **options)

    return jax.vjp(attended, q, k, v)[1](q)


def check(lowered, kernels):
    """Nothing spills, products do not wait for one another, and scores never leave the chip."""
    reports = assembler_reports(lowered, compiler_options())
    assert sorted(report.name for report in reports) == sorted(kernels)
    for report in reports:
        assert (report.spill_stores, report.spill_loads, report.warnings) == (0, 0, ())
        assert report.registers <= 255 and (report.wgmma > 0) == (report.name != JOIN)
    compiled = lowered.compile(compiler_options())
    assert compiled.memory_analysis().temp_size_in_bytes < TEMPORARY
    return compiled


@pytest.mark.parametrize(
    "queries, keys, chunk",
    [(CHUNK, CHUNK, None), (CHUNK, CHUNK, CHUNK), (CHUNK, LONG, None)],
    ids=["full", "chunked", "segment"],
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("device", TUNED_APART)
def test_forward(device, head_dim, queries, keys, chunk):
    function = functools.partial(attend, chunk=chunk)
    lowered = lower_for(*DEVICES[device](1), function, *prefill(head_dim, queries, keys))
    check(lowered, [FORWARD])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("device", TUNED_APART)
def test_gradients(device, head_dim):
    lowered = lower_for(*DEVICES[device](1), gradients, *prefill(head_dim, CHUNK, CHUNK))
    check(lowered, [FORWARD, DQ, DKV])


def test_segment_against_a_shard_of_ten_million_keys():
    lowered = lower_for(*absent_h100s(1), attend, *prefill(128, CHUNK, SHARD))
    check(lowered, [FORWARD])


def cache(format, pages, tokens, head_dim):
    """Keys or values."""
    kv = shaped(pages, KV_HEADS, tokens, head_dim)
    return kv if format == "bfloat16" else jax.eval_shape(lambda x: quantize(x, format), kv)


def decode_arguments(format, head_dim, crossed=False):
    """Queries, one and four a row, and for each a cache: rows, or pages of a pool."""
    queries = [(shaped(8, HEADS, n, head_dim), coords(8, n)) for n in (1, 4)]
    table = shaped(8, LONG // 256, dtype=jnp.int32)
    rows = cache(format, 8, LONG, head_dim), coords(8, LONG), None
    pool = cache(format, 4096, 256, head_dim), coords(4096, 256), table
    return queries, [pool, rows] if crossed else [rows, pool]


def decode(queries, caches):
    return [
        decode_attention(q, kv, kv, q_coords, k_coords, scale=0.1, table=table)
        for (q, q_coords), (kv, k_coords, table) in zip(queries, caches, strict=True)
    ]


FORMATS = [("bfloat16", 64), ("int8", 64), ("fp8", 64)]
FORMATS += [(format, 128) for format in ("bfloat16", *LARGEST)]


@pytest.mark.parametrize(
    ("device", "format", "head_dim"),
    [*(("h100", *x) for x in FORMATS), *(("h200", *x) for x in FORMATS[1::2] + FORMATS[-1:])],
)
def test_decode(device, format, head_dim):
    """Each device takes half of what can be combined: only their configs differ."""
    arguments = decode_arguments(format, head_dim, crossed=device == "h200")
    lowered = lower_for(*DEVICES[device](1), decode, *arguments)
    check(lowered, [DECODE, JOIN] * 2)


def per_head(mesh, arguments):
    """The arguments with their heads dealt out, and what each lies on."""

    def place(x):
        spec = activation_spec(mesh, (None, "heads", None, None)[: x.ndim], x.shape)
        spec = spec if x.ndim == 4 else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, spec))

    placed = jax.tree.map(place, arguments)
    return placed, jax.tree.map(lambda x: x.sharding.spec, placed)


@pytest.mark.parametrize(
    "function, kernels",
    [(attend, [FORWARD]), (gradients, [FORWARD, DQ, DKV])],
    ids=["forward", "gradients"],
)
def test_eight_devices_need_nothing_from_one_another(function, kernels):
    mesh = MeshConfig(tensor=8).make(absent_h100s(8))
    arguments, specs = per_head(mesh, prefill(128, CHUNK, CHUNK))
    with jax.set_mesh(mesh):
        out_specs = specs[0] if function is attend else specs[:3]
        dealt = per_device(function, in_specs=specs, out_specs=out_specs)
        lowered = jax.jit(dealt).lower(*arguments)
    compiled = check(lowered, kernels)
    assert not COLLECTIVE.search(compiled.as_text())


def chosen(device, which, arguments, **options):
    """What is picked for such arguments on a device."""
    with jax.sharding.use_abstract_mesh(mesh_of(*DEVICES[device](1)).abstract_mesh):
        return which(*arguments, scale=0.1, **options)


def decode_call(format, head_dim):
    (call, *_), ((kv, k_coords, _), _) = decode_arguments(format, head_dim)
    return call[0], kv, kv, call[1], k_coords


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_are_picked(device):
    assert chosen(device, flash_implementation, prefill(128, CHUNK, LONG)) == "mosaic_gpu"
    for format, head_dim in FORMATS:
        call = decode_call(format, head_dim)
        assert chosen(device, decode_implementation, call) == "mosaic_gpu"


@pytest.mark.parametrize(
    "which, arguments",
    [
        (flash_implementation, prefill(128, CHUNK, CHUNK)),
        (decode_implementation, decode_call("bfloat16", 128)),
    ],
    ids=["flash", "decode"],
)
@pytest.mark.parametrize("version", [(13, 2), (12, 9), ()])
def test_old_assemblers_are_refused(monkeypatch, which, arguments, version):
    """They miscompile the kernels silently."""
    monkeypatch.setattr(ptxas, "version", lambda path: version)
    with pytest.warns(UserWarning, match="Hopper kernels are not used"):
        assert chosen("h100", which, arguments) == "xla"
        with pytest.raises(ValueError, match=r"needs ptxas 13\.3 or newer"):
            chosen("h100", which, arguments, implementation="mosaic_gpu")


def test_spills_are_seen():
    """Catches a check that nothing fails."""
    config = FlashMosaicConfig(backward=BackwardConfig(block_q=128))
    function = functools.partial(gradients, config=config)
    lowered = lower_for(*absent_h100s(1), function, *prefill(128, CHUNK, CHUNK))
    with pytest.raises(AssertionError):
        check(lowered, [FORWARD, DQ, DKV])
