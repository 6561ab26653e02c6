"""prefix_attn on Triton's interpreter against float64: forward, decoding and every gradient."""

import dataclasses

import pytest
import torch
from internvl_kernels import prefix_attention, reference
from internvl_kernels.testing import (
    Case,
    attention_bounds,
    build,
    correctness_gate,
    mismatches,
    oracle,
    random_case,
    run,
    structured_cases,
)
from internvl_kernels.testing.cases import DTYPES
from internvl_kernels.triton_kernels import configs, launch, ops

STRUCTURED = structured_cases()
LONG = ("causal", "prefix-range", "window-prefix-range", "segments-packed", "alibi-prefix", "alibi-flags-segments")


def small(name: str) -> Case:
    """Two heads that share their keys instead of four that share two, and two tiles instead of three, but for LONG."""
    case = STRUCTURED[name]
    if (case.heads_q, case.heads_kv) == (4, 2):
        case = dataclasses.replace(case, heads_q=2, heads_kv=1)
    if case.seqlen_q == case.seqlen_k and name not in LONG:
        case = dataclasses.replace(case, seqlen_q=70, seqlen_k=70)
    return dataclasses.replace(case, dtype=DTYPES[list(STRUCTURED).index(name) % 3])


def passes(case):
    problems = correctness_gate("triton", case)
    assert not problems, "\n".join([repr(case), *problems])


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured(name):
    """Every feature, in one dtype each."""
    passes(small(name))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_in_every_dtype(name, dtype):
    passes(dataclasses.replace(STRUCTURED[name], dtype=dtype))


@pytest.mark.parametrize("head_dim", (1, 17, 80, 256))
def test_head_dims(head_dim):
    """Padded in the block; one row is decoding."""
    case = Case(1, 70, 70, 2, 1, head_dim, DTYPES[head_dim % 3], prefix_len=(30,), alibi="mpt", seed=head_dim)
    passes(case)
    passes(dataclasses.replace(case, seqlen_q=1))


@pytest.mark.parametrize("seed", range(6))
def test_random(seed):
    case = random_case(seed)
    lengths = {"seqlen_q": min(case.seqlen_q, 70), "seqlen_k": min(case.seqlen_k, 130)}
    passes(dataclasses.replace(case, batch=1, **_one_row(case), **lengths, head_dim=min(case.head_dim, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 120))
def test_random_at_length(seed):
    passes(random_case(seed))


def _one_row(case):
    names = ("prefix_len", "key_range", "query_start")
    return {name: None if getattr(case, name) is None else getattr(case, name)[:1] for name in names}


@pytest.mark.parametrize("seqlen_q", (1, 5))
def test_decoding_splits_the_keys(seqlen_q, monkeypatch):
    """A static cache filled in part, NaN beyond; heads packed into one tile, keys split, shares merged."""
    case = Case(
        batch=2, seqlen_q=seqlen_q, seqlen_k=900, heads_q=6, heads_kv=2, head_dim=16, dtype="bfloat16",
        key_range=((3, 800), (0, 70)), query_start=(800 - seqlen_q, 70 - seqlen_q), prefix_len=(40, 60), alibi="mpt",
        gradients="out",
    )  # fmt: skip
    splits = []
    chosen = launch._splits
    monkeypatch.setattr(launch, "_splits", lambda *sizes: splits.append(chosen(*sizes)) or splits[-1])
    passes(case)
    assert splits and splits[0] > 1
    whole = run(ops.prefix_attn, build(case), None)
    monkeypatch.setattr(launch, "_splits", lambda *sizes: 1)
    once = run(ops.prefix_attn, build(case), None)
    torch.testing.assert_close(whole["lse"], once["lse"])
    torch.testing.assert_close(whole["out"], once["out"], atol=1e-2, rtol=2e-2)


def test_same_bits_every_time():
    case = Case(1, 70, 70, 2, 1, 16, "bfloat16", prefix_len=(40,), alibi="random", segments="packed")
    first, second = (run(ops.prefix_attn, build(case)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name].nan_to_num(), second[name].nan_to_num()), name


def pruned_case(**changes):
    case = Case(1, 256, 256, 2, 1, 16, prefix_len=(70,), alibi="steep", seed=5)
    return dataclasses.replace(case, **changes)


@pytest.mark.parametrize("dtype", ("bfloat16", pytest.param("float32", marks=pytest.mark.slow)))
def test_distance_pruning_skips_tiles_and_changes_nothing(dtype, monkeypatch):
    """Keys so far that they weigh nothing are not visited: a poisoned one is not noticed, and no result moves."""
    case = pruned_case(dtype=dtype)
    inputs = build(case)
    inputs.alibi_slopes = torch.tensor([2.0, 0.01])
    monkeypatch.setenv("INTERNVL_ALIBI_PRUNE", "0")
    plain = run(ops.prefix_attn, inputs)
    monkeypatch.setenv("INTERNVL_ALIBI_PRUNE", "1")
    pruned = run(ops.prefix_attn, inputs)
    truth = oracle(inputs)
    bounds = attention_bounds(inputs, truth)
    for results in (plain, pruned):
        assert not mismatches(results, truth, bounds, lambda: run(reference.prefix_attn, inputs))
    visited = []
    for on in ("0", "1"):
        monkeypatch.setenv("INTERNVL_ALIBI_PRUNE", on)
        visited.append(_visited_keys(inputs))
    assert visited[1] < visited[0], visited


def _visited_keys(inputs):
    """Queries of the steep head that a huge value in key 0 reaches through 0 * inf."""
    v = inputs.v.clone()
    norms = launch.key_tiles
    v[:, 0] = torch.inf

    def blind(call, block_n, wanted, earlier=None):
        """The prepass as if v were finite: it would keep such tiles."""
        return norms(dataclasses.replace(call, v=inputs.v), block_n, wanted, earlier)

    launch.key_tiles = blind
    try:
        out, _ = ops.prefix_attn(
            inputs.q, inputs.k, v, prefix_len=inputs.mask["prefix_len"], alibi_slopes=inputs.alibi_slopes
        )
    finally:
        launch.key_tiles = norms
    return int(out[0, :, 0].isnan().any(-1).sum())


def test_infinite_values_reach_every_row_that_sees_them():
    """Pruning is off where a value is not finite."""
    inputs = build(pruned_case())
    inputs.v[:, 0] = torch.inf
    terms = {"prefix_len": inputs.mask["prefix_len"], "alibi_slopes": inputs.alibi_slopes}
    out, _ = ops.prefix_attn(inputs.q, inputs.k, inputs.v, **terms)
    assert not out.isfinite().all(-1).any()


def test_the_public_call():
    """backend="triton" with boolean masks; without a request, CPU tensors go to the compiled kernels."""
    q, k, v = (torch.randn(2, 40, 2, 8) for _ in range(3))
    real = torch.ones(2, 40, dtype=torch.bool)
    real[0, 30:] = False
    found = prefix_attention(q, k, v, key_padding_mask=real, backend="triton")
    torch.testing.assert_close(found, prefix_attention(q, k, v, key_padding_mask=real, backend="reference"))
    holes = real.clone()
    holes[:, 7] = False
    for terms in ({"prefix_len": 9}, {"bidirectional_mask": holes, "window": 3}):
        found = prefix_attention(q, k, v, key_padding_mask=holes, backend="triton", **terms)
        wanted = prefix_attention(q, k, v, key_padding_mask=holes, backend="reference", **terms)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 1), (2, 0, 4, 2, 1), (2, 4, 0, 2, 1)])
def test_nothing_to_do(shape):
    batch, seqlen_q, seqlen_k, heads_q, heads_kv = shape
    case = Case(batch, seqlen_q, seqlen_k, heads_q, heads_kv, 8, alibi="mpt")
    through = "both" if seqlen_k else "out"  # without keys the reference's lse is a constant
    got = run(ops.prefix_attn, build(case), through)
    truth = oracle(build(case), through)
    for name, right in truth.items():
        assert torch.equal(got[name].double(), right.double()), name


def test_far_positions():
    """int32 data at its limits, windows included."""
    for start in (-(2**31), 2**31 - 1):
        for window in (0, 2**30 - 70):
            passes(Case(1, 5, 70, 1, 1, 16, prefix_len=(3,), query_start=(start,), window=window, gradients="both"))


def test_every_configuration_has_a_row():
    for keys in (("default",), ("interpreter", "default"), ("sm90", "default"), ("gfx942", "amd", "default")):
        for role in ("fwd", "decode", "dkdv", "dq"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for head_dim in (1, 64, 65, 128, 129, 256):
                    assert configs.attention(role, keys, dtype, head_dim).block_m >= 16
