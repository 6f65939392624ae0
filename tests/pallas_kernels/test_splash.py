"""The splash kernel: compiled for TPUs that are not there, and interpreted over several blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import (
    Coords,
    flash_attention,
    flash_implementation,
    make_mask,
    visible,
)
from pallas_kernels.attention.flash import FlashCase
from pallas_kernels.attention.flash_splash import FlashSplashConfig, _Slots, computed_blocks
from pallas_kernels.compile.absent import absent_tpus
from tests.pallas_kernels.attention.test_guest_mask import Window

TPUS = ["v5p:2x2x1", "v6e:2x2"]
TOKENS, CHUNK = 16384, 8192
SCORES = 40 * TOKENS**2 * 4  # bytes
SHAPES = {"q": (1, 40, TOKENS, 128), "k": (1, 8, TOKENS, 128), "v": (1, 8, TOKENS, 128)}


def one_tpu(topology):
    axis_types = (jax.sharding.AxisType.Explicit,)
    return jax.sharding.Mesh(np.array(absent_tpus(topology)[:1]), "chip", axis_types=axis_types)


def llama4(mesh, dtype="bfloat16", coords=True):
    """Scout's queries, keys and values, and where the tokens are unless they are plain."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shaped = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    tokens = Coords(*[shaped((1, TOKENS), "int32")] * 2)
    return *(shaped(shape, dtype) for shape in SHAPES.values()), tokens if coords else None


def call(q, k, v, coords, *, implementation="splash", **options):
    options |= {"scale": q.shape[-1] ** -0.5, "in_order": coords is not None}
    return flash_attention(q, k, v, coords, coords, implementation=implementation, **options)


def gradients(q, k, v, coords, **options):
    """Stands in for a layer's backward pass; the cotangent is q."""
    return jax.vjp(lambda *qkv: call(*qkv, coords, **options), q, k, v)[1](q)


def compile_for(topology, function, **draw):
    mesh = one_tpu(topology)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*llama4(mesh, **draw)).compile()


@pytest.mark.absent_tpu
@pytest.mark.parametrize(
    ("chunk", "coords"), [(CHUNK, True), (None, False)], ids=["chunked-coords", "full-plain"]
)
@pytest.mark.parametrize("function", [call, gradients])
@pytest.mark.parametrize("topology", TPUS)
def test_compiles_for_tpus(topology, function, chunk, coords):
    """Catches blocks that do not fit on chip, and scores that leave it."""
    compiled = compile_for(topology, functools.partial(function, chunk=chunk), coords=coords)
    assert "splash_mha_fwd" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < SCORES / 20


@pytest.mark.absent_tpu
@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize(
    "function, options",
    [
        (functools.partial(gradients, chunk=CHUNK), {"dtype": "float32"}),
        (functools.partial(call, chunk=CHUNK, return_lse=True), {}),
    ],
    ids=["float32", "lse"],
)
def test_other_calls_compile_for_tpus(topology, function, options):
    """Catches blocks for bfloat16 that do not fit on chip in float32."""
    compiled = compile_for(topology, function, **options)
    assert compiled.memory_analysis().temp_size_in_bytes < SCORES / 20


@pytest.mark.absent_tpu
@pytest.mark.parametrize("topology", TPUS)
def test_tpus_get_splash(topology):
    """Catches a choice by the machine that compiles instead of the one that runs."""
    mesh = one_tpu(topology)
    q, k, v, coords = llama4(mesh)
    chosen = functools.partial(flash_implementation, q, k, v, coords, coords, scale=1.0)
    assert chosen(in_order=True) == "xla"
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert chosen(in_order=True) == "splash"
        assert chosen(in_order=False) == "xla"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": "float16"}, "not float16"),
        ({"head_dim": 512}, "not 512"),
        ({"mask": Window()}, "no windows"),
        ({"in_order": False}, "in_order"),
        ({"interpret": None}, "needs a TPU, and this is cpu"),
    ],
)
def test_says_why_not(change, reason):
    options = {"mask": None, "in_order": True, "interpret": True}
    options |= {name: change[name] for name in options if name in change}
    shape = (1, 2, 8, change.get("head_dim", 8))
    x = jax.ShapeDtypeStruct(shape, change.get("dtype", "float32"))
    coords = Coords(*[jax.ShapeDtypeStruct((1, 8), "int32")] * 2)
    with pytest.raises(ValueError, match=reason):
        flash_implementation(x, x, x, coords, coords, scale=1.0, implementation="splash", **options)


def test_blocks_are_whole_lanes():
    with pytest.raises(ValueError, match="block_k 100 must be a multiple of 128"):
        FlashSplashConfig(block_k=100)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("chunk", [None, 10, 40, 1])
@pytest.mark.parametrize("blocks", [(8, 8), (16, 8), (8, 24)])
def test_meets_only_blocks_that_some_token_needs(blocks, chunk, aligned):
    """96 tokens; a chunk may begin at any of them unless slots are positions."""
    starts = [0] if aligned or chunk is None else range(chunk)
    needed = np.any([block_needed(start, chunk, *blocks) for start in starts], axis=0)
    mask = _Slots(96, make_mask(chunk=chunk), aligned)
    edges = [[slice(i, i + size) for i in range(0, 96, size)] for size in blocks]
    met = [[mask[q, k].item() for k in edges[1]] for q in edges[0]]
    np.testing.assert_array_equal(met, needed)


@pytest.mark.parametrize(
    ("tokens", "chunk", "expected"),
    [(8192, 8192, 36), (8192, None, 36), (8192, 2048, 1 + 2 + 6 * 3), (2560, 8192, 6)],
)
def test_how_many_blocks_are_computed(tokens, chunk, expected):
    """A triangle of blocks of 1,024, or a band of it; 2,560 tokens are three blocks of 896."""
    sizes = 1, 5, 1, tokens, tokens, 128
    case = FlashCase(*sizes, "bfloat16", 1.0, make_mask(chunk=chunk), in_order=True)
    assert computed_blocks(case, FlashSplashConfig()) == expected


def block_needed(start, chunk, block_q, block_k):
    tokens = Coords(start + jnp.arange(96)[None], jnp.ones((1, 96), jnp.int32))
    seen = visible(make_mask(chunk=chunk).key_range(tokens), tokens)
    return np.asarray(seen.reshape(96 // block_q, block_q, 96 // block_k, block_k).any((1, 3)))


def place(*rows):
    """Coords of rows that are written as runs (segment, count) or (segment, count, start)."""

    def lay(of_run):
        return jnp.array([np.concatenate([of_run(*run) for run in row]) for row in rows], "int32")

    return Coords(
        position=lay(lambda segment, count, start=0: start + np.arange(count)),
        segment=lay(lambda segment, count, start=0: np.full(count, segment)),
    )


FAR = 10_485_760 - 150
ROWS = {
    "plain": None,
    "padded": place([(0, 170), (1, 130)], [(1, 129), (0, 171)], [(0, 300)]),
    "packed": place([(1, 99), (2, 150), (3, 1), (0, 50)], [(7, 1), (2, 299)], [(1, 300)]),
    "far": place([(1, 300, FAR)], [(1, 140), (2, 160, FAR + 7)], [(1, 150), (0, 150)]),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def draw(dtype, heads=(4, 2), head_dim=64, length=300):
    """q, k, v, and the cotangents of the output and the log-sum-exp."""
    rng = np.random.default_rng(0)
    shapes = [(3, count, length, head_dim) for count in (*heads, heads[1], heads[0])]
    *arrays, d_lse = (
        jnp.array(rng.standard_normal(s), "float32") for s in [*shapes, shapes[0][:3]]
    )
    return *(x.astype(dtype) for x in arrays), d_lse


@functools.partial(jax.jit, static_argnames=("options",))
def results(options, coords, q, k, v, d_out, d_lse):
    """Output, log-sum-exp if wanted, and the gradients of q, k and v."""
    attend = functools.partial(call, coords=coords, **dict(options))
    out, transpose = jax.vjp(attend, q, k, v)
    if isinstance(out, tuple):  # the kernel gives these only where nothing is differentiated
        out, d_out = attend(q, k, v), (d_out, d_lse)
    return out, transpose(d_out)


def assert_close(got, want, tolerance):
    """Largest error within `tolerance` of the largest value; -inf in the same places; no NaN."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    assert not np.isnan(got).any()
    np.testing.assert_array_equal(got == -np.inf, want == -np.inf)
    got, want = (np.where(want == -np.inf, 0, x) for x in (got, want))
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def check(rows, arrays, **options):
    """The kernel against the plain path, over several blocks of queries and of keys."""
    kernel = {"implementation": "splash", "interpret": True, "config": FlashSplashConfig(128, 256)}
    got, want = (
        jax.tree.leaves(results(tuple((options | path).items()), ROWS[rows], *arrays))
        for path in (kernel, {"implementation": "xla"})
    )
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert_close(x, y, TOLERANCE[arrays[0].dtype.name])


@pytest.mark.parametrize("chunk", [100, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", ROWS)
def test_output_and_gradients(rows, chunk):
    check(rows, draw("float32"), chunk=chunk)


@pytest.mark.slow
def test_bfloat16():
    check("packed", draw("bfloat16", heads=(5, 1), head_dim=128), chunk=100)


def test_log_sum_exp():
    check("padded", draw("float32"), chunk=100, return_lse=True)


def test_float32_is_not_rounded_on_tpus():
    """Catches products in a TPU's default precision, backward ones too: that is bfloat16's."""
    q, k, v, d_out, d_lse = draw("float32", length=128)
    options = (("chunk", None), ("interpret", True))
    jaxpr = str(jax.make_jaxpr(functools.partial(results, options, None))(q, k, v, d_out, d_lse))
    exact = jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert jaxpr.count("dot_general[") == exact > 8
