"""Decoding: few query rows per key head, every way in which the CPU kernels and others may cut it."""

import dataclasses
import math

import pytest
import torch
from internvl_kernels import backends
from internvl_kernels.testing import Case, build, correctness_gate, device_of, run

BACKENDS = [name for name, backend in backends.BACKENDS.items() if name != "reference" and not backend.here()]
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("plain", "bhsd", "fused", "offset")
MASKS = {
    "causal": {},
    "ranges": {"key_range": ((0, 400), (37, 391)), "prefix_len": (0, 60)},
    "window": {"window": 150, "prefix_len": (20, 0)},
    "moved": {"query_start": (120, 396)},
    "flags": {"key_flags": "holes"},
    "segments": {"segments": "packed"},
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2), (12, 12), (20, 5), (18, 3), (32, 1)])
def test_heads_and_layouts(backend, heads, dtype, layout):
    for head_dim in (24, 40):
        case = Case(2, 1, 401, *heads, head_dim, dtype, alibi="mpt", layout=layout, seed=1)
        assert not correctness_gate(backend, case), repr(case)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen_q", [1, 2, 3, 7, 16])
def test_masks(backend, seqlen_q, mask):
    for heads, dtype in (((2, 2), "float32"), ((4, 2), "bfloat16"), ((6, 6), "float16")):
        case = Case(2, seqlen_q, 400, *heads, 16, dtype, alibi="mpt", seed=2, **MASKS[mask])
        assert not correctness_gate(backend, case), repr(case)


def test_rows_of_unequal_length(backend):
    """A batch whose rows are cut into different numbers of key splits, one of them without a visible key."""
    ranges = ((0, 3000), (0, 130), (2990, 3000), (0, 0), (0, 1500))
    for heads in ((8, 8), (8, 1)):
        case = Case(5, 1, 3000, *heads, 16, "float32", alibi="mpt", key_range=ranges, seed=3)
        assert not correctness_gate(backend, case), repr(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_no_bit(backend, layout, dtype):
    """Keys of a head side by side, or heads of a key: another order of reading, the same sums."""
    operator = backends.BACKENDS[backend].ops["prefix_attn"]
    for heads in ((10, 10), (8, 2), (16, 2)):
        case = Case(1, 1, 1500, *heads, 40, dtype, alibi="mpt", layout=layout, seed=4)
        inputs = build(case).to(device=device_of(backend))
        plain = dataclasses.replace(inputs, **{name: getattr(inputs, name).contiguous() for name in "qkv"})
        a, b = run(operator, inputs, None), run(operator, plain, None)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("heads", [(2, 2), (8, 8), (8, 2), (8, 1)])
def test_what_one_key_holds(backend, heads, value):
    """NaN and infinities of the last visible key arrive as they are; behind it anything may stand."""
    operator, device = backends.BACKENDS[backend].ops["prefix_attn"], device_of(backend)
    for last in (4, 5, 6, 7, 130):
        k, v = torch.randn(1, 140, heads[1], 16, device=device), torch.randn(1, 140, heads[1], 16, device=device)
        q = torch.randn(1, 1, heads[0], 16, device=device)
        v[0, last, :, 3] = value
        k[0, last + 1 :], v[0, last + 1 :] = math.nan, math.inf
        key_range = torch.tensor([[0, last + 1]], dtype=torch.int32, device=device)
        out, lse = operator(q, k, v, key_range=key_range)
        assert lse.isfinite().all()
        column = out[..., 3]
        assert (column.isnan() if math.isnan(value) else column == value).all()
        out[..., 3] = 0
        assert out.isfinite().all()
