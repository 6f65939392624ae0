"""Attention compiled for GPUs without wgmma that are not there: no step of a loop asks the host.

XLA's host copies a loop's predicate from the GPU at every step unless the loop's length is known,
and waits at every `conditional`. Nothing is run or timed here, cuDNN least of all: its library is
not installed, and XLA compiles a call of it all the same.
"""

import functools
import re

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels.attention import flash_attention, flash_implementation, flash_xla
from pallas_kernels.compile.absent import absent_gpus, compiler_options, lower_for, mesh_of
from pallas_kernels.quantized import LARGEST
from tests.pallas_kernels.test_absent_gpu import (
    CHUNK,
    HEADS,
    LONG,
    attend,
    decode,
    decode_arguments,
    gradients,
    prefill,
)

pytestmark = pytest.mark.absent_gpu

KINDS = ("a100", "l40s", "b200")
TEMPORARY = HEADS * CHUNK**2  # bytes; the scores of a chunk with itself are four times as many
FORMATS = ("bfloat16", *LARGEST)
every_kind = pytest.mark.parametrize("kind", KINDS)
# One program is lowered for all of them. What XLA makes of it is looked at on one each, in turn.
a100, l40s, b200 = (pytest.mark.parametrize("kind", [kind]) for kind in KINDS)


@pytest.fixture
def cudnn(monkeypatch):
    """JAX asks the library for its version while tracing."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def check(lowered, branches=0, temporary=TEMPORARY) -> str:
    """No loop waits for data, and so many branches there are, none of them in a loop."""
    compiled = lowered.compile(compiler_options())
    text = compiled.as_text()
    loops = re.findall(r" while\(.*", text)
    assert [loop for loop in loops if "known_trip_count" not in loop] == []
    computations = text.split("\n\n")
    bodies = [name for loop in loops for name in re.findall(r"body=%([^\s,]+)", loop)]
    inside = [x for x in computations if _name(x) in bodies]
    assert len(inside) == len(loops) and not any(" conditional(" in x for x in inside)
    assert text.count(" conditional(") == branches
    assert compiled.memory_analysis().temp_size_in_bytes < temporary
    return text


def _name(computation: str) -> str:
    found = re.match(r"\s*(?:ENTRY )?%(\S+)", computation)
    return found[1] if found else ""


def loop_lengths(text: str) -> list[int]:
    return sorted(int(n) for n in re.findall(r'known_trip_count":{"n":"(\d+)"', text))


@pytest.mark.parametrize(
    ("kind", "function"), [*((kind, attend) for kind in KINDS), ("l40s", gradients)]
)
def test_tokens_in_order(kind, function):
    """About half of the 16 x 8 pairs of blocks, and none of them chosen by data."""
    in_order = functools.partial(function, in_order=True)
    lowered = lower_for(*absent_gpus(kind, 1), in_order, *prefill(128, CHUNK, CHUNK))
    loops = 1 if function is attend else 2
    assert loop_lengths(check(lowered)) == [72] * loops


@a100
def test_chunks_cost_their_band(kind):
    function = functools.partial(attend, in_order=True, chunk=CHUNK)
    arguments = prefill(128, 4 * CHUNK, 4 * CHUNK)
    (length,) = loop_lengths(check(lower_for(*absent_gpus(kind, 1), function, *arguments)))
    assert length < 64 * 32 / 4


@b200
def test_one_branch_a_call_where_chunks_may_be_in_any_order(kind):
    """As on a mesh that spreads a sequence: the queries are a part of the tokens."""
    function = functools.partial(attend, chunk=CHUNK)
    arguments = prefill(128, CHUNK, LONG)
    narrow, whole = loop_lengths(
        check(lower_for(*absent_gpus(kind, 1), function, *arguments), branches=1)
    )
    assert (narrow, whole) == (16 * 10, 16 * 128)


@l40s
def test_keys_before_the_queries(kind):
    check(lower_for(*absent_gpus(kind, 1), attend, *prefill(128, CHUNK, LONG)))


@pytest.mark.parametrize(("kind", "format"), [*zip((*KINDS, "a100"), FORMATS, strict=True)])
def test_decode(kind, format):
    lowered = lower_for(*absent_gpus(kind, 1), decode, *decode_arguments(format, 128))
    check(lowered)


@pytest.mark.parametrize(
    ("kind", "queries", "options"),
    [
        ("a100", CHUNK, {}),
        ("l40s", 4 * CHUNK, {"chunk": CHUNK}),
        ("b200", 4 * CHUNK - 100, {"chunk": CHUNK}),
    ],
    ids=["full", "chunked", "part of a chunk"],
)
@pytest.mark.parametrize("plain", [False, True], ids=["coordinates", "plain"])
def test_cudnn(cudnn, kind, queries, options, plain):
    """Without coordinates nothing is asked; with them, one branch a call and one a gradient."""
    qkv, coords = prefill(128, queries, queries)[:3], prefill(128, queries, queries)[3:]

    def gradients(q, k, v, *coords):
        rule = {"scale": 0.1, "in_order": True, "implementation": "cudnn", **options}
        return jax.vjp(lambda *x: flash_attention(*x, *coords, **rule), q, k, v)[1](q)

    arguments = qkv if plain else (*qkv, *coords)
    lowered = lower_for(*absent_gpus(kind, 1), gradients, *arguments)
    text = check(lowered, branches=0 if plain else 2, temporary=queries / CHUNK * TEMPORARY)
    assert set(re.findall(r'"(__cudnn[^"]*)"', text)) == {
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
    }


@a100
def test_loops_that_wait_for_data_are_seen(kind):
    """Catches a check that nothing fails."""
    function = functools.partial(attend, config=flash_xla.FlashXlaConfig(data_decides=True))
    lowered = lower_for(*absent_gpus(kind, 1), function, *prefill(128, CHUNK, CHUNK))
    with pytest.raises(AssertionError, match="while"):
        check(lowered)


def picked(kind, arguments, **options):
    with jax.sharding.use_abstract_mesh(mesh_of(*absent_gpus(kind, 1)).abstract_mesh):
        return flash_implementation(*arguments, scale=0.1, **options)


@every_kind
def test_cudnn_is_picked_where_it_serves(cudnn, kind):
    itself, later = prefill(128, CHUNK, CHUNK), prefill(128, CHUNK, LONG)
    assert picked(kind, itself, in_order=True) == "cudnn"
    assert picked(kind, itself[:3], chunk=CHUNK) == "cudnn"
    assert picked(kind, itself, in_order=True, return_lse=True) == "xla"
    assert picked(kind, itself) == picked(kind, later) == "xla"


@every_kind
def test_xla_is_picked_where_jax_finds_no_cudnn(monkeypatch, kind):
    def nowhere():
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", nowhere)
    arguments = prefill(128, CHUNK, CHUNK)
    assert picked(kind, arguments, in_order=True) == "xla"
    with pytest.raises(ValueError, match="JAX refuses: cuDNN not found"):
        picked(kind, arguments, in_order=True, implementation="cudnn")
