"""prefix_attn: forward, backward, decoding, growth with the length, pruning, head dims, and the cost of a call."""

from __future__ import annotations

import pytest
import torch
from internvl_kernels import prefix_attention

from .conftest import entries


@pytest.mark.parametrize("entry", entries(lambda name: not name.startswith(("norm", "model"))))
def test_prefix_attn(measured, entry):
    row = measured(entry)
    assert row["ours"]["median_ms"] > 0


def test_call_overhead(benchmark):
    """A tiny call is nearly all overhead: Python, dispatcher, check, plan."""
    q = torch.randn(1, 4, 2, 16)
    prefix_len, slopes = torch.tensor([2], dtype=torch.int32), torch.tensor([0.5, 0.25])
    benchmark.group = "overhead"
    with torch.no_grad():
        benchmark(lambda: prefix_attention(q, q, q, prefix_len=prefix_len, alibi_slopes=slopes))
