"""The CUDA forward on the emulator: right within the gate's bounds, no race, no byte out of place, the same bits."""

import dataclasses

import pytest
import torch
from emulator import attention
from internvl_kernels import testing
from internvl_kernels.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = Case(seqlen_q=96, seqlen_k=160, heads_q=2, heads_kv=1, head_dim=64, dtype="bfloat16")
STRUCTURED = testing.structured_cases()


def vary(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured(name):
    case = STRUCTURED[name]
    if case.heads_q == 4:
        case = dataclasses.replace(case, heads_q=2, heads_kv=min(case.heads_kv, 1 + case.seed % 2))
    case = dataclasses.replace(case, head_dim=32, dtype="float16" if case.seed % 3 == 0 else "bfloat16")
    assert attention.problems(case, seed=case.seed) == []


HEAD_DIMS = (1, 8, 20, 64, 72, 96, 100, 128, 136, 256)


@pytest.mark.parametrize("head_dim,dtype", [(d, "bfloat16") for d in HEAD_DIMS] + [(d, "float16") for d in (100, 128)])
def test_head_dims(head_dim, dtype):
    case = vary(head_dim=head_dim, dtype=dtype, alibi="mpt", prefix_len=(30,), seqlen_q=70, seqlen_k=140)
    assert attention.problems(case, seed=head_dim) == []


@pytest.mark.parametrize("seqlen_q", (1, 2, 63, 65, 127, 128, 129))
def test_tile_edges(seqlen_q):
    for seqlen_k in (1, 63, 64, 65, 129):
        case = vary(seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=1, alibi="mpt", seed=seqlen_k)
        assert attention.problems(case) == [], case


@pytest.mark.parametrize("layout", ("fused", "bhsd", "offset", "expanded"))
def test_layouts(layout):
    case = vary(layout=layout, heads_kv=2, batch=2, seqlen_q=70, seqlen_k=70, prefix_len=(0, 50))
    for head_dim in (64, 20):
        assert attention.problems(dataclasses.replace(case, head_dim=head_dim)) == []


@pytest.mark.parametrize("batch,seqlen_q,seqlen_k", ((1, 0, 5), (1, 5, 0), (2, 1, 0), (0, 5, 5)))
def test_nothing_to_attend(batch, seqlen_q, seqlen_k):
    case = vary(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, alibi="mpt")
    got, _ = attention.forward(testing.build(case))
    assert (got["out"] == 0).all() and (got["lse"] == -torch.inf).all()


@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
def test_devices_with_less_shared_memory(head_dim):
    """8.6, 8.9 and 12.0 take every forward."""
    device = attention.Device(46, 86, 99 * 1024)
    for seqlen_q in (1, 70):
        inputs = testing.build(vary(head_dim=head_dim, seqlen_q=seqlen_q, seqlen_k=300))
        _, session = attention.forward(inputs, device=device)
        assert all(kernel["shared_bytes"] <= device.max_shared_bytes for kernel in session.kernels().values())


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("heads_q", (1, 40))
def test_offsets_beyond_int32(heads_q, dim):
    """Of decoding (80 query rows are the forward's)."""
    inputs = testing.build(vary(batch=2, seqlen_q=2, seqlen_k=2, heads_q=heads_q, alibi="mpt"))
    near, far = (attention.forward(each)[0] for each in (inputs, attention.spread(inputs, dim)))
    assert all(torch.equal(near[name], far[name]) for name in near)


def test_the_same_bits_twice():
    case = vary(alibi="mpt", key_flags="holes", segments="packed", heads_kv=2)
    inputs = testing.build(case)
    first, _ = attention.forward(inputs)
    again, _ = attention.forward(inputs)
    assert torch.equal(first["out"], again["out"]) and torch.equal(first["lse"], again["lse"])


@pytest.mark.parametrize("prune", (False, True))
def test_pruning_keeps_the_result(prune):
    """Steep slopes, a far prefix, outlying keys: the worst for a bound made of norms."""
    case = vary(seqlen_q=640, seqlen_k=640, heads_q=1, alibi="mpt", prefix_len=(640,))
    inputs = testing.build(case)
    inputs.alibi_slopes = torch.tensor([0.5])
    inputs.k[:, 3::97] *= 6
    got, session = attention.forward(inputs, prune=prune)
    truth = testing.oracle(inputs, None)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, None)  # noqa: E731
    assert testing.mismatches(got, truth, testing.attention_bounds(inputs, truth), eager) == []
    tiles = session.kernels()["prefix_attn_fwd"]["mma"] // (2 * 4 * 2 * 8 * 4)  # products, warps, mma of one product
    assert (tiles == 50) if not prune else (tiles < 40)  # 5 query tiles x 10 key tiles


@pytest.mark.parametrize("seed", range(25))
def test_random(seed):
    case = testing.random_case(seed + 7000)
    case = dataclasses.replace(case, dtype="bfloat16" if seed % 2 else "float16")
    if case.head_dim > 128:
        case = dataclasses.replace(case, dtype="bfloat16")
    if case.batch * case.heads_q * case.seqlen_q * case.seqlen_k > 200_000:
        case = dataclasses.replace(case, heads_q=case.heads_kv, seqlen_q=min(case.seqlen_q, 150))
    assert attention.problems(case, seed=seed) == []


def test_a_missing_barrier_or_wait_is_found():
    """Every one is needed: the loop's in a call of several tiles, the one before the output where no key is visible."""
    several = testing.build(vary(seqlen_q=70, seqlen_k=300, heads_q=1))
    none = testing.build(vary(seqlen_q=70, seqlen_k=70, heads_q=1, key_range=((9, 9),)))
    _, session = attention.forward(several)
    sites = session.kernels()["prefix_attn_fwd"]["synchronising"]
    own = [site for site in sites if "prefix_attn_fwd_kernel" in site]
    assert len(own) >= 5
    for site in own:
        with pytest.raises(AssertionError):
            attention.forward(several, skip=site)
            attention.forward(none, skip=site)


def test_shared_memory_has_no_bank_conflicts():
    """Fragments, copies and the staged output: as few wavefronts as the bytes need."""
    case = vary(seqlen_q=128, seqlen_k=128, heads_q=1)
    for head_dim in (64, 96, 128, 256):
        inputs = testing.build(dataclasses.replace(case, head_dim=head_dim))
        _, session = attention.forward(inputs, bank_conflicts=True)
        kernel = session.kernels()["prefix_attn_fwd"]
        assert kernel["ldmatrix_wavefronts"] == 4 * kernel["ldmatrix"]
