"""clip_qk_layernorm against clamp, split and two layer norms."""

from __future__ import annotations

import pytest
import torch
from internvl_kernels import clip_qk_layernorm

ROWS, WIDTH, CLIP = 2048, 2048, 6.0


def _unfused(qkv, weight, bias):
    x = qkv.clamp(-CLIP, CLIP)
    q, k, v = x.split(WIDTH, dim=-1)
    return *(torch.nn.functional.layer_norm(t, (WIDTH,), weight, bias) for t in (q, k)), v.contiguous()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clip_qk_layernorm(compare, dtype, direction):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(ROWS, 3 * WIDTH, generator=generator).to(dtype).requires_grad_(direction == "backward")
    weight, bias = (torch.randn(WIDTH, generator=generator).to(dtype) for _ in range(2))

    def ours():
        return clip_qk_layernorm(qkv, WIDTH, WIDTH, CLIP, weight, bias, weight, bias)

    runs = {"ours": ours, "unfused": lambda: _unfused(qkv, weight, bias)}
    tolerance = 8 * torch.finfo(dtype).eps
    for got, want in zip(runs["ours"](), runs["unfused"](), strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    if direction == "backward":
        for name, forward in list(runs.items()):
            out = forward()
            ones = [torch.ones_like(t) for t in out]
            runs[name] = lambda out=out, ones=ones: torch.autograd.grad(out, qkv, ones, retain_graph=True)
    source, target = torch.randn(ROWS, 3 * WIDTH).to(dtype), torch.empty(ROWS, 3 * WIDTH, dtype=dtype)
    compare(
        f"clip_qk_layernorm {direction} {dtype}".replace("torch.", ""),
        runs.pop("ours"),
        {**runs, "copy": lambda: target.copy_(source)},
        rounds=15,
    )
