"""ALiBi distance pruning: prune.h, and that it leaves results as they are to below the rounding of the dtype."""

import math

import pytest
import torch
from internvl_kernels import env, prefix_attention, registration

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
        assert env.alibi_prune() is wanted
        assert prefix_attention(q, q, q, alibi_slopes=slopes).isfinite().all()
    monkeypatch.setenv("INTERNVL_ALIBI_PRUNE", "off")
    with pytest.raises(ValueError, match=r"INTERNVL_ALIBI_PRUNE is 'off'; allowed: 0 \(off\), 1"):
        env.alibi_prune()
    with pytest.raises(ValueError, match=r"INTERNVL_ALIBI_PRUNE is 'off'; allowed: 0 \(off\), 1"):
        prefix_attention(q, q, q, alibi_slopes=slopes)
    assert prefix_attention(q, q, q).isfinite().all()  # no slopes: the variable is not asked for
