"""The CUDA backward on the emulator: given the true out and lse, gradients within the gate's bounds."""

import dataclasses

import pytest
import torch
from emulator import EmulatorError, attention
from internvl_kernels import testing
from internvl_kernels.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = Case(seqlen_q=96, seqlen_k=160, heads_q=2, heads_kv=1, head_dim=64, dtype="bfloat16")
STRUCTURED = testing.structured_cases()
LITTLE_SHARED = attention.Device(46, 86, 99 * 1024)


def vary(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured(name):
    case = STRUCTURED[name]
    if case.heads_q == 4:
        case = dataclasses.replace(case, heads_q=2, heads_kv=min(case.heads_kv, 1 + case.seed % 2))
    case = dataclasses.replace(case, head_dim=32, dtype="float16" if case.seed % 3 == 0 else "bfloat16")
    assert attention.backward_problems(case, seed=case.seed) == []


HEAD_DIMS = (1, 8, 20, 64, 72, 96, 100, 128, 136, 256)


@pytest.mark.parametrize("head_dim,dtype", [(d, "bfloat16") for d in HEAD_DIMS] + [(d, "float16") for d in (100, 128)])
def test_head_dims(head_dim, dtype):
    """Every tile size, whole and padded; at 256 two warps share their keys."""
    case = vary(head_dim=head_dim, dtype=dtype, alibi="mpt", prefix_len=(30,), seqlen_q=70, seqlen_k=140)
    assert attention.backward_problems(case, seed=head_dim) == []


@pytest.mark.parametrize("key_flags,segments,window", (("holes", "packed", 0), ("random", None, 40)))
@pytest.mark.parametrize("head_dim", (128, 256))
def test_general_masks_of_wide_heads(head_dim, key_flags, segments, window):
    case = vary(head_dim=head_dim, key_flags=key_flags, segments=segments, window=window, alibi="random")
    assert attention.backward_problems(case) == []


@pytest.mark.parametrize("head_dim,key_flags", ((64, None), (96, None), (100, "holes"), (128, None)))
def test_devices_with_less_shared_memory(head_dim, key_flags):
    """8.6, 8.9 and 12.0: at head dims up to 128 with other tiles."""
    case = vary(head_dim=head_dim, alibi="mpt", seqlen_q=150, seqlen_k=200, key_flags=key_flags)
    inputs = testing.build(case)
    assert attention.backward_problems(case, inputs, device=LITTLE_SHARED, prune=head_dim != 128) == []
    _, session = attention.backward(
        inputs, *attention.saved(inputs, testing.oracle(inputs, None)), device=LITTLE_SHARED
    )
    assert all(kernel["shared_bytes"] <= LITTLE_SHARED.max_shared_bytes for kernel in session.kernels().values())


def test_too_little_shared_memory_is_refused():
    inputs = testing.build(vary(head_dim=256))
    saved = attention.saved(inputs, testing.oracle(inputs, None))
    with pytest.raises(EmulatorError, match=r"needs 139840 bytes of shared memory; the device allows 101376.*triton"):
        attention.backward(inputs, *saved, device=LITTLE_SHARED)


@pytest.mark.parametrize("dim", (0, 1))
def test_offsets_beyond_int32(dim):
    inputs = testing.build(vary(batch=2, seqlen_q=2, seqlen_k=2, alibi="mpt"))
    saved = attention.saved(inputs, testing.oracle(inputs, None))
    near, far = (attention.backward(each, *saved)[0] for each in (inputs, attention.spread(inputs, dim)))
    assert all(torch.equal(near[name], far[name]) for name in near)


@pytest.mark.parametrize("seqlen_q", (1, 63, 65, 129))
def test_tile_edges(seqlen_q):
    for seqlen_k in (1, 64, 129):
        case = vary(seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=1, alibi="mpt", seed=seqlen_k)
        assert attention.backward_problems(case, seed=seqlen_k) == [], case


@pytest.mark.parametrize("layout", ("fused", "bhsd", "offset", "expanded"))
def test_layouts(layout):
    case = vary(layout=layout, heads_kv=2, batch=2, seqlen_q=70, seqlen_k=70, prefix_len=(0, 50))
    for head_dim in (64, 20):
        assert attention.backward_problems(dataclasses.replace(case, head_dim=head_dim)) == []


@pytest.mark.parametrize("seqlen_q,seqlen_k", ((0, 5), (5, 0)))
def test_nothing_to_attend(seqlen_q, seqlen_k):
    case = vary(seqlen_q=seqlen_q, seqlen_k=seqlen_k, alibi="mpt")
    inputs = testing.build(case)
    out = torch.zeros_like(inputs.q)
    lse = torch.full((1, 2, seqlen_q), -torch.inf)
    got, _ = attention.backward(inputs, out, lse)
    assert all((gradient == 0).all() for gradient in got.values())


def test_rows_and_keys_that_nobody_meets_hold_nan():
    """Rows without a visible key and keys without a query: their contents, out and gradients never matter."""
    case = vary(batch=2, key_range=((100, 160), (7, 7)), segments="packed", seqlen_q=160, alibi="mpt")
    inputs = testing.build(case)
    truth = testing.oracle(inputs, "both")
    out, lse = attention.saved(inputs, truth)
    empty = ~inputs.visible().any(-1)
    assert empty.any() and not empty.all()
    poisoned = dataclasses.replace(inputs, q=inputs.q.clone(), grad_out=inputs.grad_out.clone())
    for tensor in (poisoned.q, poisoned.grad_out, out):
        tensor[empty] = torch.nan
    got, _ = attention.backward(poisoned, out, lse)
    bounds = testing.attention_bounds(inputs, truth)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, "both")  # noqa: E731
    assert testing.mismatches(got, {name: truth[name] for name in got}, bounds, eager) == []


def test_the_same_bits_in_any_order():
    case = vary(alibi="mpt", key_flags="holes", segments="packed", heads_q=4, heads_kv=2)
    for head_dim in (64, 256):
        inputs = testing.build(dataclasses.replace(case, head_dim=head_dim))
        saved = attention.saved(inputs, testing.oracle(inputs, None))
        first, _ = attention.backward(inputs, *saved, seed=1)
        again, _ = attention.backward(inputs, *saved, seed=2)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_pruning_keeps_the_result():
    """Steep slopes, a far prefix, outlying keys: the worst for a bound made of norms."""
    case = vary(seqlen_q=256, seqlen_k=768, query_start=(256,), alibi="mpt", prefix_len=(768,))
    inputs = testing.build(case)
    inputs.alibi_slopes = torch.tensor([0.5, -0.01])  # nothing may be skipped under the second
    inputs.k[:, 3::97] *= 6
    work = []
    for prune in (False, True):
        assert attention.backward_problems(case, inputs, prune=prune) == []
        saved = attention.saved(inputs, testing.oracle(inputs, None))
        kernels = attention.backward(inputs, *saved, prune=prune)[1].kernels()
        work.append([kernels[name]["mma"] for name in ("prefix_attn_bwd_kv", "prefix_attn_bwd_q")])
    assert all(0.5 < pruned / full < 0.9 for full, pruned in zip(*work, strict=True))


def test_sums_that_truncate():
    case = vary(alibi="mpt", prefix_len=(40,))
    assert attention.backward_problems(case, toward_zero=True) == []


@pytest.mark.parametrize("seed", range(16))
def test_random(seed):
    case = testing.random_case(seed + 9000)
    case = dataclasses.replace(case, dtype="bfloat16" if seed % 2 or case.head_dim > 128 else "float16")
    if case.batch * case.heads_q * case.seqlen_q * case.seqlen_k > 100_000:
        case = dataclasses.replace(case, heads_q=case.heads_kv, seqlen_q=min(case.seqlen_q, 100))
    assert attention.backward_problems(case, seed=seed, sum_order=seed) == []


@pytest.mark.parametrize("head_dim", (64, 256))
def test_every_missing_barrier_and_wait_is_noticed(head_dim):
    """Each is needed in one of three calls: several tiles, none at all, and more tiles than one list holds."""
    rows, keys = (192, 192) if head_dim == 64 else (96, 65)
    several = vary(seqlen_q=rows, seqlen_k=keys, heads_q=1, head_dim=head_dim, alibi="mpt")
    none = vary(seqlen_q=8, seqlen_k=64, heads_q=1, head_dim=head_dim, key_range=((9, 9),))
    many = vary(batch=1, seqlen_q=1, seqlen_k=8 + 256 * 64, heads_q=1, head_dim=8, window=9)
    packed = vary(batch=1, seqlen_q=1, seqlen_k=9, heads_q=260, head_dim=8, window=9)
    calls = [several, none, many, packed] if head_dim == 64 else [several, none]
    made = []
    for case in calls:
        inputs = testing.build(case)
        made.append((inputs, *attention.saved(inputs, testing.oracle(inputs, None))))
    kernels = attention.backward(*made[0])[1].kernels()
    sites = {site for name, kernel in kernels.items() if "bwd" in name for site in kernel["synchronising"]}
    assert len(sites) >= 10
    for site in sites:
        if "steps" in site and head_dim == 256:
            continue  # the list of tiles, as at 64
        with pytest.raises(EmulatorError):
            for call in made:
                attention.backward(*call, skip=site)


@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
def test_shared_memory_has_no_bank_conflicts(head_dim):
    inputs = testing.build(vary(seqlen_q=128, seqlen_k=128, heads_q=1, head_dim=head_dim, alibi="mpt"))
    saved = attention.saved(inputs, testing.oracle(inputs, None))
    _, session = attention.backward(inputs, *saved, bank_conflicts=True)
    for name in ("prefix_attn_bwd_kv", "prefix_attn_bwd_q"):
        kernel = session.kernels()[name]
        assert kernel["ldmatrix_wavefronts"] == 4 * kernel["ldmatrix"]
        for site, (_, parts, ideal) in kernel["accesses"].items():
            if "shared" in site or "cp.async" in site:
                assert parts == ideal, site
