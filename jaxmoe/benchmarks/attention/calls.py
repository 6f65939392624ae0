"""The contenders of `jaxmoe benchmark attention`: jaxmoe's kernels, cuDNN, XLA and torch.

A builder makes a contender's `Call`, and is absent if its library cannot express the case. cuDNN
and torch read the same memory, reinterpreted in their own layouts, since its values are random.
"""

import functools
import importlib
from collections.abc import Callable

import jax

from jaxmoe.benchmarks import tables
from jaxmoe.benchmarks.attention.cases import HEAD_DIM, HEADS, KV_HEADS, SCALE, Case, Inputs
from jaxmoe.benchmarks.timing import Call, torch_with_cuda
from pallas_kernels.attention import flash_attention


def builders(case: Case, inputs: Inputs, implementation: str) -> dict[str, Callable[[], Call]]:
    """The functions that make the calls to time on a case, by contender."""
    calls = {
        "jaxmoe": lambda: _jax_call(case, inputs, _ours(case, implementation)),
        "xla": lambda: _jax_call(case, inputs, _ours(case, "xla")),
    }
    whole = case.queries == case.keys or case.kind == "decode"
    if case.format == "bf16" and whole:  # cuDNN's causal mask aligns the first query and key
        calls["cudnn"] = lambda: _jax_call(case, inputs, functools.partial(_cudnn, case))
    if case.format == "bf16" and (torch := torch_with_cuda()):
        calls["torch"] = lambda: _torch_call(torch, case, inputs)
    return {name: calls[name] for name in tables.ATTENTION_CONTENDERS if name in calls}


def _ours(case: Case, implementation: str) -> Callable:
    if case.kind == "decode":
        from pallas_kernels.attention.decode import decode_attention

        return functools.partial(decode_attention, scale=SCALE, implementation=implementation)
    return functools.partial(
        flash_attention,
        scale=SCALE,
        chunk=case.chunk,
        implementation=implementation,
    )


def _cudnn(case: Case, q, k, v, q_coords, k_coords):
    """Attention by cuDNN, with chunks as rows, and with the lengths of a cache as an array."""
    shape, length = q.shape, min(case.chunk or case.keys, case.keys)
    rows = case.rows * case.keys // length
    q = q.reshape(rows, -1, HEADS, HEAD_DIM)
    k, v = (x.reshape(rows, length, KV_HEADS, HEAD_DIM) for x in (k, v))
    out = jax.nn.dot_product_attention(
        *(q, k, v),
        scale=SCALE,
        is_causal=case.kind != "decode",
        key_value_seq_lengths=q_coords.position[:, 0] + 1 if case.kind == "decode" else None,
        implementation="cudnn",
    )
    return out.reshape(shape)


def _jax_call(case: Case, inputs: Inputs, attend: Callable) -> Call:
    make = {"prefill": _prefill_call, "backward": _backward_call, "decode": _decode_call}
    return make[case.kind](inputs, jax.jit(attend))


def _prefill_call(inputs: Inputs, attend: Callable) -> Call:
    arguments = inputs.q, *inputs.caches[0], *inputs.coords
    return Call(lambda: attend(*arguments))


def _backward_call(inputs: Inputs, attend: Callable) -> Call:
    """Times the backward pass alone, with residuals computed beforehand."""

    @jax.jit
    def forward(q, k, v, coords):
        return jax.vjp(lambda q, k, v: attend(q, k, v, *coords), q, k, v)

    out, pull = forward(inputs.q, *inputs.caches[0], inputs.coords)
    d_out = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    backward = jax.jit(lambda pull, d_out: pull(d_out))
    return Call(lambda: backward(pull, d_out))


def _decode_call(inputs: Inputs, attend: Callable) -> Call:
    """Times attention to all caches in sequence, as in the layers of a model.

    Each output is the next query, whose values do not affect a memory-bound kernel. What depends
    on coordinates alone is computed once for all caches, as in a model.
    """

    @jax.jit
    def layers(q, caches, coords):
        for k, v in caches:
            q = attend(q, k, v, *coords)
        return q

    arguments = inputs.q, inputs.caches, inputs.coords
    return Call(lambda: layers(*arguments), count=len(inputs.caches))


def _torch_call(torch, case: Case, inputs: Inputs) -> Call:
    """Times torch's scaled_dot_product_attention: a CUDA graph's replay, or its backward pass."""
    length = min(case.chunk or case.keys, case.keys)
    rows = case.rows * case.keys // length
    q, *tokens = (
        torch.from_dlpack(x).view(rows, heads, -1, HEAD_DIM)
        for x, heads in ((inputs.q, HEADS), *((x, KV_HEADS) for kv in inputs.caches for x in kv))
    )
    attend = functools.partial(_torch_attend, torch, case)
    if case.kind == "backward":
        return _torch_backward(torch, attend, q, *tokens)
    return _torch_graph(torch, attend, q, list(zip(tokens[::2], tokens[1::2], strict=True)))


def _torch_attend(torch, case: Case, q, k, v):
    masks = {"is_causal": case.kind != "decode"}
    if 1 < case.queries < case.keys:
        bias = importlib.import_module("torch.nn.attention.bias")
        masks = {"attn_mask": bias.causal_lower_right(case.queries, case.keys)}
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, scale=SCALE, enable_gqa=True, **masks)


def _torch_graph(torch, attend: Callable, q, caches: list) -> Call:
    attend(q, *caches[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        kept = [attend(q, k, v) for k, v in caches]

    def start():
        graph.replay()
        return kept  # keeps the outputs from being freed while the graph exists

    return Call(start, lambda _: torch.cuda.synchronize(), len(caches))


def _torch_backward(torch, attend: Callable, *inputs) -> Call:
    leaves = [x.requires_grad_() for x in inputs]
    out = attend(*leaves)
    d_out = torch.randn_like(out)
    return Call(
        lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True),
        lambda _: torch.cuda.synchronize(),
    )
