"""ALiBi distance pruning: prune.h, and that it leaves results as they are to below the rounding of the dtype."""

import math

import pytest
import torch
from internvl_kernels import backends, prefix_attention, reference, registration, variables

_C = pytest.importorskip("internvl_kernels._C", reason=str(registration.LIBRARY_ERROR))
LOG_EPS = {"float32": -30 * math.log(2), "bfloat16": -20 * math.log(2), "float16": -20 * math.log(2)}


# --- the rule itself


@pytest.mark.parametrize("dtype", LOG_EPS)
@pytest.mark.parametrize("seqlen_k", [1, 2, 1000, 2**30])
def test_threshold(dtype, seqlen_k):
    assert _C.prune_threshold(dtype, seqlen_k) == pytest.approx(math.log(seqlen_k) - LOG_EPS[dtype], rel=1e-6)
    assert _C.prune_threshold(dtype, 0) == pytest.approx(-LOG_EPS[dtype], rel=1e-6)


def test_norm_is_never_too_small():
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-45, 19):
        for width in (1, 8, 80, 256):
            x = torch.randn(width, generator=generator) * 10.0**exponent
            total = torch.zeros(())
            for value in x:
                total += value * value
            exact = x.double().square().sum().sqrt().item()
            assert exact <= _C.prune_norm(total.item()) <= exact * 1.001 + 1e-17
    assert _C.prune_norm(math.inf) == math.inf
    assert math.isnan(_C.prune_norm(math.nan))


def test_tile_distance_is_the_smallest_distance():
    for p_lo in range(-3, 12):
        for p_hi in range(p_lo, p_lo + 4):
            for j_lo in range(8):
                for j_hi in range(j_lo + 1, j_lo + 5):
                    want = min(abs(p - j) for p in range(p_lo, p_hi + 1) for j in range(j_lo, j_hi))
                    assert _C.tile_distance(p_lo, p_hi, j_lo, j_hi) == want


def test_cutoff_is_the_rule():
    """A skipped distance satisfies the inequality in exact arithmetic, and the cutoff is not wastefully large."""
    generator = torch.Generator().manual_seed(1)
    skipped = 0
    for _ in range(20000):
        r = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        slope = torch.tensor(2.0 ** (2 - 14 * r[0])).item()
        scale, q, k = (torch.tensor(10.0 ** (6 * r[i] - 3)).item() * (-1) ** (i == 1) for i in (1, 2, 3))
        lower = torch.tensor((r[4] - 0.5) * 10.0 ** (4 * r[5])).item()
        threshold = _C.prune_threshold("float32", 8192)
        cutoff = _C.prune_cutoff(slope, scale, q, k, lower, threshold)
        exact = (abs(scale) * q * k - lower + threshold) / slope
        assert exact <= cutoff <= exact + 1e-5 * (abs(scale) * q * k + abs(lower) + threshold) / slope
        distance = int(r[6] * 2**20)
        if _C.prune_tile(cutoff, distance):
            skipped += 1
            assert abs(scale) * q * k - slope * distance < lower - threshold
    assert skipped > 1000


@pytest.mark.parametrize("distance", [0, 1, 2**30])
def test_nothing_is_skipped_without_a_bound(distance):
    ordinary = {"slope": 1.0, "softmax_scale": 0.1, "q_norm": 1.0, "k_norm": 1.0, "lower": 0.0, "threshold": 30.0}
    assert _C.prune_tile(_C.prune_cutoff(*ordinary.values()), 2**30)
    for change in (
        {"slope": 0.0},
        {"slope": -1.0},
        {"slope": math.nan},
        {"lower": -math.inf},
        {"lower": math.inf},
        {"lower": math.nan},
        {"q_norm": math.inf},
        {"k_norm": math.nan},
        {"q_norm": 0.0, "k_norm": math.inf},
        {"q_norm": 3e38, "k_norm": 3e38},
    ):
        assert not _C.prune_tile(_C.prune_cutoff(*(ordinary | change).values()), distance), change


# --- the switch


def test_switch(monkeypatch):
    q = torch.randn(1, 4, 2, 8)
    slopes = torch.ones(2)
    for value, wanted in {"": True, "1": True, "0": False}.items():
        monkeypatch.setenv("INTERNVL_ALIBI_PRUNE", value)
        assert variables.alibi_prune() is wanted
        assert prefix_attention(q, q, q, alibi_slopes=slopes).isfinite().all()
    monkeypatch.setenv("INTERNVL_ALIBI_PRUNE", "off")
    with pytest.raises(ValueError, match=r"INTERNVL_ALIBI_PRUNE is 'off'; allowed: 0 \(off\), 1"):
        variables.alibi_prune()
    with pytest.raises(ValueError, match=r"INTERNVL_ALIBI_PRUNE is 'off'; allowed: 0 \(off\), 1"):
        prefix_attention(q, q, q, alibi_slopes=slopes)
    assert prefix_attention(q, q, q).isfinite().all()  # no slopes: the variable is not asked for


# --- the kernels

BACKENDS = [name for name, backend in backends.BACKENDS.items() if name != "reference" and not backend.here()]
EPS = {name: math.exp(value) for name, value in LOG_EPS.items()}
SLOPES = (0.0, 2.0**-8, 2.0**-4, 1.0, -(2.0**-8))
MASKS = {  # prefix keys to the right of a query as well as to its left
    "causal": {},
    "prefix": {"prefix_len": torch.tensor([1500], dtype=torch.int32)},
    "all": {"prefix_len": torch.tensor([2048], dtype=torch.int32)},
    "window": {"window": 900, "prefix_len": torch.tensor([100], dtype=torch.int32)},
    "range": {"key_range": torch.tensor([[300, 1900]], dtype=torch.int32)},
    "flags": {"key_flags": (1 + 2 * (torch.arange(2048) // 100 % 2)).to(torch.uint8)[None]},
    "segments": {"segment_ids": (torch.arange(2048) // 1000).to(torch.int32)[None]},
    "beyond": {"query_start": torch.tensor([4000], dtype=torch.int32)},
}
NORMS = ("random", "equal", "large", "huge", "zero")


@pytest.fixture(params=BACKENDS)
def operator(request):
    return backends.BACKENDS[request.param].ops["prefix_attn"]


def keys_and_queries(norms, seqlen_q, seqlen_k, heads, head_dim=16):
    """q, k [1, S, H, D]: the bound is sharp where every key equals every query."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, n, heads, head_dim, generator=generator) for n in (seqlen_q, seqlen_k))
    if norms == "equal":
        q, k = torch.ones_like(q), torch.ones_like(k)
    scale = {"large": 4.0, "huge": 3e8, "zero": 0.0}.get(norms, 1.0)
    return q * scale, k * scale


def in_float64(q, k, v, **terms):
    slopes = terms.pop("alibi_slopes").double()
    return reference.prefix_attn(q.double(), k.double(), v.double(), alibi_slopes=slopes, **terms)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("mask", MASKS)
def test_dropped_mass(operator, mask, norms, dtype, monkeypatch):
    """V holds one column per 128 keys: out is the mass of each run of keys, and 0 where it was left out."""
    q, k = (x.to(getattr(torch, dtype)) for x in keys_and_queries(norms, 160, 2048, len(SLOPES)))
    v = torch.eye(16, dtype=q.dtype).repeat_interleave(128, 0)[None, :, None].expand_as(k).contiguous()
    terms = {"alibi_slopes": torch.tensor(SLOPES), "query_start": torch.tensor([900], dtype=torch.int32)} | MASKS[mask]
    out = operator(q, k, v, **terms)[0].double()
    truth = in_float64(q, k, v, **terms)[0]
    if norms == "huge":  # scores of 1e17 leave fp32 nothing to be exact with: the kernel itself without pruning
        monkeypatch.setenv("INTERNVL_ALIBI_PRUNE", "0")
        truth = operator(q, k, v, **terms)[0].double()
    mass = torch.where((out == 0) & (truth > 1e-36), truth, 0.0).sum(-1)  # [1, Sq, H]
    assert float(mass.max()) <= EPS[dtype]
    assert not mass[..., [0, 4]].any(), "slopes that are not positive skip nothing"
    if norms in ("random", "equal") and mask in ("causal", "prefix", "all", "flags"):
        assert mass[..., 2].any(), "slope 1/16 must skip something"


@pytest.mark.parametrize("norms", ["equal", "random"])
def test_dropped_mass_of_long_rows(operator, norms):
    """Slope 2^-8 needs more than 7450 keys before anything may go when all scores are equal."""
    q, k = keys_and_queries(norms, 4, 16384, 1)
    q = q.repeat(1, 40, 8, 1)  # enough rows and heads that the keys are not split
    v = torch.linspace(0, 15.99, 16384).long().eq(torch.arange(16)[:, None]).T.float().contiguous()[None, :, None]
    terms = {"alibi_slopes": torch.full((8,), 2.0**-8)}
    out, truth = operator(q, k, v, **terms)[0], in_float64(q, k, v, **terms)[0]
    dropped = torch.where((out == 0) & (truth > 1e-36), truth, 0.0).sum(-1)
    assert 0 < float(dropped.max()) <= EPS["float32"]


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("mask", MASKS)
def test_with_and_without(operator, mask, dtype, monkeypatch):
    """out, lse and every gradient agree to below the rounding of the dtype."""
    kind = getattr(torch, dtype)
    q, k = (x.to(kind) for x in keys_and_queries("random", 300, 2048, 4))
    v, grad = torch.randn_like(k), torch.randn_like(q)
    terms = {"query_start": torch.tensor([700], dtype=torch.int32)} | MASKS[mask]
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv("INTERNVL_ALIBI_PRUNE", switch)
        leaves = [x.clone().requires_grad_() for x in (q, k, v, torch.tensor([2.0**-7, 2.0**-3, 0.5, 3.0]))]
        out, lse = operator(*leaves[:3], alibi_slopes=leaves[3], **terms)
        results.append([out, lse, *torch.autograd.grad(out, leaves, grad)])
    for name, on, off in zip(("out", "lse", "dq", "dk", "dv", "dslopes"), *results, strict=True):
        tolerance = 4 * torch.finfo(on.dtype).eps
        if name == "dslopes":  # a sum over keys and rows of signed terms times distances
            tolerance = 1e-3 if dtype != "float32" else 1e-5
        torch.testing.assert_close(on, off, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("where", ["k", "v", "q", "grad"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_everyone_who_sees_it(operator, where, value, monkeypatch):
    """Far keys under a steep slope are not skipped when they, or the row, hold NaN or infinities."""
    q, k = keys_and_queries("random", 1024, 1024, 2)
    tensors = {"q": q, "k": k, "v": torch.randn_like(k), "grad": torch.randn_like(q)}
    tensors[where][0, 700 if where in ("q", "grad") else 5, 0, 3] = value
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv("INTERNVL_ALIBI_PRUNE", switch)
        leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
        out, lse = operator(*leaves, alibi_slopes=torch.tensor([1.0, 1.0]))
        results.append([out, lse, *torch.autograd.grad(out, leaves, tensors["grad"])])
    assert any(not x.isfinite().all() for x in results[1])
    for on, off in zip(*results, strict=True):
        assert torch.equal(on.isfinite(), off.isfinite())
