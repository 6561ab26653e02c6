"""prefix_attn against SDPA and eager attention with a dense bias: forward, backward, decode, and the cost of a call."""

from __future__ import annotations

import pytest
import torch
from internvl_kernels import prefix_attention

from . import baselines, cases, roofline

DTYPES = [torch.float32, torch.bfloat16]


def _gate(ours, peer, dtype: torch.dtype) -> None:
    """No timing of a wrong result: ours and SDPA agree to a few roundings of the dtype."""
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours(), peer(), atol=tolerance, rtol=tolerance)


def _calls(case, dtype, requires_grad=False):
    arguments = case.tensors(dtype, requires_grad)
    bias = baselines.dense_bias(case, dtype, arguments["prefix_len"], arguments["alibi_slopes"])
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    peers = {name: (lambda peer=peer: peer(q, k, v, bias)) for name, peer in baselines.PEERS.items()}
    return arguments, (lambda: prefix_attention(**arguments)), peers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.FORWARD, ids=lambda case: case.name)
def test_forward(compare, case, dtype):
    with torch.no_grad():
        _, ours, peers = _calls(case, dtype)
        _gate(ours, peers["sdpa"], dtype)
        compare(
            f"forward {case.name} {dtype}".replace("torch.", ""),
            ours,
            {**peers, "mm": _matmul_of(case.forward_flops, dtype)},
            flops=case.forward_flops,
            target=("sdpa", 1.5),
        )


def _matmul_of(flops: float, dtype: torch.dtype):
    """A plain matrix product of the same number of FLOPs: its ratio is our share of the ceiling."""
    size = 1024
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, round(flops / (2 * size * size))).to(dtype)
    return lambda: a @ b


@pytest.mark.parametrize("case", cases.BACKWARD, ids=lambda case: case.name)
def test_backward(compare, case):
    """fp32 only: SDPA's bf16 backward takes minutes on processors without bf16 instructions."""
    arguments, ours, peers = _calls(case, torch.float32, requires_grad=True)
    inputs = tuple(arguments[name] for name in "qkv")
    runs = {}
    for name, forward in {"ours": ours, **peers}.items():
        out = forward()
        cotangent = torch.ones_like(out)
        runs[name] = lambda out=out, cotangent=cotangent: torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
    for got, want in zip(runs["ours"](), runs["sdpa"](), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    compare(
        f"backward {case.name} float32",
        runs.pop("ours"),
        {**runs, "mm": _matmul_of(2.5 * case.forward_flops, torch.float32)},
        flops=2.5 * case.forward_flops,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.DECODE, ids=lambda case: case.name)
def test_decode(compare, case, dtype):
    with torch.no_grad():
        _, ours, peers = _calls(case, dtype)
        _gate(ours, peers["sdpa"], dtype)
        compare(f"{case.name} {dtype}".replace("torch.", ""), ours, peers, flops=case.forward_flops)


def test_call_overhead(benchmark):
    """A tiny call is nearly all overhead: Python, dispatcher, check, plan. Target: below 20 us over the kernel."""
    with torch.no_grad():
        arguments = cases.TINY.tensors(torch.float32)
        benchmark.group = "overhead"
        benchmark(lambda: prefix_attention(**arguments))
        benchmark.extra_info["copy_gbytes"] = roofline.copy_gbytes(64)
