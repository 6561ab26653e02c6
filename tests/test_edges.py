"""The smallest, the empty, the far outside, and tile sizes with their neighbours."""

import dataclasses
import itertools

import pytest
import torch
from internvl_kernels import backends, prefix_attention, reference
from internvl_kernels.testing import Case, build, correctness_gate, device_of, run

BACKENDS = [name for name, backend in backends.BACKENDS.items() if name != "reference" and not backend.here()]
pytestmark = pytest.mark.usefixtures("dirty_scratch")
TILES = (48, 64, 96, 128)  # rows and keys per tile of the CPU kernels, forward and backward
EDGES = sorted({n + d for n in TILES for d in (-1, 0, 1)})


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def check(backend, *cases):
    for case in cases:
        problems = correctness_gate(backend, case)
        assert not problems, "\n".join([repr(case), *problems])


def int32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="looks at the compiled CPU operator")
def test_uninitialised_memory_is_poisoned():
    """conftest's NaN reaches what the C++ side allocates, so that an element nobody wrote cannot hide."""
    assert torch.empty(3).isnan().all()
    x = torch.randn(1, 2, 1, 4)
    with torch.profiler.profile() as profile:
        torch.ops.internvl.prefix_attn(x, x, x)
    names = [event.name for event in profile.events()]
    assert names.count("aten::new_empty") == names.count("aten::fill_") == 2, names


@pytest.mark.parametrize("seqlen", EDGES)
def test_tile_neighbours(backend, seqlen):
    base = Case(seqlen_q=seqlen, seqlen_k=seqlen, heads_q=2, heads_kv=1, head_dim=16, seed=seqlen)
    check(
        backend,
        dataclasses.replace(base, alibi="mpt"),
        dataclasses.replace(base, prefix_len=(seqlen - 1,)),
        dataclasses.replace(base, seqlen_q=5, window=33),
        dataclasses.replace(base, seqlen_k=3, prefix_len=(2,)),
        dataclasses.replace(base, key_range=((1, seqlen - 1),), alibi="mpt"),
    )


@pytest.mark.parametrize("edge", (48, 128))
def test_prefix_and_range_on_tile_borders(backend, edge):
    for prefix, end in itertools.product((edge - 1, edge, edge + 1), repeat=2):
        check(
            backend, Case(1, 150, 150, 1, 1, 8, prefix_len=(prefix,), key_range=((edge - end % 3, end),), alibi="mpt")
        )


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_single_pair(backend, dtype):
    """S = 1: out is v, lse is the score, and q and k get no gradient through out."""
    for head_dim in (1, 7, 256):
        case = Case(1, 1, 1, 1, 1, head_dim, dtype, alibi="random", gradients="out")
        check(backend, case, dataclasses.replace(case, gradients="both"))
        inputs = build(case).to(device=device_of(backend))
        results = run(backends.BACKENDS[backend].ops["prefix_attn"], inputs, "out")
        assert torch.equal(results["out"], inputs.v.cpu())


@pytest.mark.parametrize("batch,seqlen_q,seqlen_k", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("terms", ["none", "compact", "general"])
def test_nothing(backend, batch, seqlen_q, seqlen_k, terms):
    """Empty batch, queries or keys: empty or zero results, -inf lse, zero gradients."""
    device = device_of(backend)
    q = torch.randn(batch, seqlen_q, 4, 8, device=device, requires_grad=True)
    k, v = (torch.randn(batch, seqlen_k, 2, 8, device=device, requires_grad=True) for _ in "kv")
    slopes = torch.rand(4, device=device, requires_grad=True)
    mask = {
        "none": {},
        "compact": {
            "prefix_len": torch.ones(batch, dtype=torch.int32),
            "key_range": torch.ones(batch, 2, dtype=torch.int32),
            "query_start": torch.ones(batch, dtype=torch.int32),
        },
        "general": {
            "key_flags": torch.ones(batch, seqlen_k, dtype=torch.uint8),
            "segment_ids": torch.ones(batch, seqlen_k, dtype=torch.int32),
        },
    }[terms]
    mask = {name: t.to(device) for name, t in mask.items()}
    for operator in (backends.BACKENDS[backend].ops["prefix_attn"], reference.prefix_attn):
        out, lse = operator(q, k, v, alibi_slopes=slopes, **mask)
        assert out.shape == q.shape and lse.shape == (batch, 4, seqlen_q)
        if seqlen_k == 0:
            assert (out == 0).all() and (lse == -torch.inf).all()
        grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), (q, k, v, slopes), allow_unused=True)
        if seqlen_q == 0 or seqlen_k == 0 or batch == 0:
            assert all(g is None or (g == 0).all() for g in grads)


def test_empty_rows_beside_full_ones(backend):
    """Rows without a key among rows with keys, within one tile, in every form."""
    check(
        backend,
        Case(2, 100, 100, 2, 2, 16, key_range=((60, 100), (100, 100)), alibi="mpt"),
        Case(2, 100, 100, 2, 2, 16, query_start=(-50, -100), window=3),
        Case(2, 100, 100, 2, 2, 16, query_start=(-50, 70), segments="packed", prefix_len=(20, 100)),
        Case(2, 100, 100, 2, 2, 16, key_flags="none"),
        Case(2, 1, 600, 2, 2, 16, key_range=((600, 900), (0, 0))),
    )
    x = torch.randn(1, 4, 1, 8, device=device_of(backend))
    out, lse = prefix_attention(x, x, x, key_range=int32([2, 4], device=x.device), return_lse=True, backend=backend)
    assert (out[0, :2] == 0).all() and lse[0, 0].isneginf().tolist() == [True, True, False, False]


@pytest.mark.parametrize("start", (-(2**31), -(10**6), -17, -16, 0, 15, 16, 17, 10**6, 2**31 - 1))
def test_query_start_far_outside(backend, start):
    """int32's limits: the formula, without overflow, with and without prefix and window."""
    base = Case(2, 9, 16, 2, 2, 8, query_start=(start, 3), seed=1)
    check(
        backend,
        base,
        dataclasses.replace(base, prefix_len=(5, 5)),
        dataclasses.replace(base, window=4, prefix_len=(2**31 - 1, -(2**31))),
        dataclasses.replace(base, window=2**30),
        dataclasses.replace(base, segments="packed", prefix_len=(5, 5)),
        dataclasses.replace(base, key_flags="holes"),
        dataclasses.replace(base, key_range=((3, 2**31 - 1), (2**31 - 2, 2**31 - 1))),
    )


@pytest.mark.parametrize("start", (-(2**31), -3000, 3000, 2**31 - 1))
def test_alibi_from_far_away(backend, start):
    """Distances of thousands, rising and falling over the keys; at int32's limits only a softmax is asked for."""
    base = Case(2, 60, 300, 2, 2, 8, query_start=(start, 240), prefix_len=(300, 20), alibi="mpt", gradients="out")
    if abs(start) == 3000:
        check(backend, base, dataclasses.replace(base, alibi="negative"), dataclasses.replace(base, seqlen_q=2))
    inputs = build(base).to(device=device_of(backend))
    results = run(backends.BACKENDS[backend].ops["prefix_attn"], inputs, None)
    assert not results["out"].isnan().any() and not results["lse"].isnan().any()
    assert results["out"].abs().max() <= inputs.v[~inputs.v.isnan()].abs().max() * 1.001


@pytest.mark.parametrize("alibi", ("zero", "negative", "steep"))
def test_slopes(backend, alibi):
    base = Case(2, 150, 150, 3, 3, 16, alibi=alibi, prefix_len=(70, 0), seed=3)
    check(backend, base, dataclasses.replace(base, window=20), dataclasses.replace(base, seqlen_q=1))


def test_zero_slopes_change_nothing(backend):
    x = torch.randn(1, 50, 2, 16, device=device_of(backend))
    zero = torch.zeros(2, device=x.device)
    for a, b in zip(
        prefix_attention(x, x, x, alibi_slopes=zero, return_lse=True, backend=backend),
        prefix_attention(x, x, x, return_lse=True, backend=backend),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_large_scores(backend, dtype):
    """Scores in the hundreds: the softmax is nearly one-hot and nothing overflows."""
    base = Case(2, 100, 130, 2, 2, 64, dtype, softmax_scale=20.0, prefix_len=(50, 0))
    check(backend, base, dataclasses.replace(base, softmax_scale=-20.0), dataclasses.replace(base, seqlen_q=1))


def test_equal_scores_average(backend):
    """softmax_scale 0: out is the mean of the visible values, lse the log of their number."""
    v = torch.randn(1, 140, 1, 24, device=device_of(backend))
    out, lse = prefix_attention(v, v, v, softmax_scale=0.0, return_lse=True, backend=backend)
    count = torch.arange(1, 141, device=v.device)
    torch.testing.assert_close(out, v.cumsum(1) / count[None, :, None, None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0, 0], count.float().log(), atol=1e-6, rtol=1e-6)


def test_nan_query_stays_in_its_row(backend):
    """A NaN in a query that sees keys is that row's own: its neighbours in the tile keep their bits."""
    q, k, v = (torch.randn(1, 60, 2, 16, device=device_of(backend)) for _ in "qkv")
    clean = prefix_attention(q, k, v, return_lse=True, backend=backend)
    for rows in (60, 2):  # packed tiles, and rows read where they stand
        poisoned = q[:, -rows:].clone()
        poisoned[0, -1, 1, 3] = torch.nan
        out, lse = prefix_attention(poisoned, k, v, return_lse=True, backend=backend)
        assert out[0, -1, 1].isnan().all() and lse[0, 1, -1].isnan()
        assert int(out.isnan().sum()) == 16 and int(lse.isnan().sum()) == 1
        keep = ~out.isnan()
        torch.testing.assert_close(out[keep], clean[0][:, -rows:][keep], atol=1e-6, rtol=1e-6)


def test_infinite_values_pass(backend):
    """An infinity in a visible value is a result like any other, in its own column."""
    v = torch.randn(1, 20, 1, 8, device=device_of(backend))
    q = torch.randn_like(v)
    v[0, 0, 0, 2] = torch.inf
    out = prefix_attention(q, q, v, backend=backend)
    assert out[..., 2].isposinf().all() and out[..., [0, 1, 3, 4, 5, 6, 7]].isfinite().all()


def test_fp16_range(backend):
    """Results near fp16's largest number do not overflow on the way."""
    device = device_of(backend)
    q = torch.zeros(1, 200, 1, 8, dtype=torch.float16, device=device)
    v = torch.full_like(q, 60000.0)
    assert (prefix_attention(q, q, v, backend=backend) == 60000).all()
    k = torch.full_like(q, 250.0)
    out, lse = prefix_attention(k, k, v, return_lse=True, backend=backend)  # scores of 176 777
    assert (out == 60000).all() and lse.isfinite().all()
