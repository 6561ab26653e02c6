"""Hopper's forward on the emulator: right within the gate's bounds, silent, and no wait that could be left out."""

import dataclasses

import pytest
import torch
from emulator import attention, operators
from internvl_kernels import testing
from internvl_kernels.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = Case(seqlen_q=96, seqlen_k=160, heads_q=2, heads_kv=1, head_dim=64, dtype="bfloat16")
STRUCTURED = testing.structured_cases()
ONE = dataclasses.replace(attention.HOPPER, multiprocessors=1)  # its block works on all query tiles


def vary(**changes):
    return dataclasses.replace(SMALL, **changes)


def problems(case, seed=0, **options):
    """The seed also says how many blocks share the query tiles."""
    device = dataclasses.replace(attention.HOPPER, multiprocessors=(132, 1, 3)[seed % 3])
    return attention.problems(case, device=device, seed=seed, **options)


def forward(case_or_inputs, device=attention.HOPPER, **options):
    inputs = testing.build(case_or_inputs) if isinstance(case_or_inputs, Case) else case_or_inputs
    return attention.forward(inputs, device=device, **options)


def test_it_is_the_hopper_kernel_that_runs():
    _, session = forward(SMALL)
    counts = session.kernels()["prefix_attn_fwd"]
    assert counts["mma"] == 0 and counts["wgmma"] > 0
    _, session = attention.forward(testing.build(SMALL))
    assert session.kernels()["prefix_attn_fwd"]["mma"] > 0


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured(name):
    case = STRUCTURED[name]
    case = dataclasses.replace(case, head_dim=64, dtype="float16" if case.seed % 3 == 0 else "bfloat16")
    assert problems(case, seed=case.seed, sum_order=case.seed) == []


@pytest.mark.parametrize("head_dim", (1, 20, 64, 72, 96, 128, 136, 192, 256))
def test_head_dims(head_dim):
    case = vary(head_dim=head_dim, alibi="mpt", prefix_len=(30,), seqlen_q=140, seqlen_k=400)
    assert problems(case, seed=head_dim) == []


@pytest.mark.parametrize("key_flags,segments,window", (("holes", "packed", 0), ("random", None, 40)))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_general_masks(head_dim, key_flags, segments, window):
    case = vary(head_dim=head_dim, key_flags=key_flags, segments=segments, window=window, alibi="random", seqlen_k=330)
    assert problems(case, seed=head_dim) == []


@pytest.mark.parametrize("seqlen_q", (1, 63, 65, 191, 192, 193))
def test_tile_edges(seqlen_q):
    for seqlen_k in (1, 127, 128, 129, 257):
        case = vary(seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=1, alibi="mpt", seed=seqlen_k)
        assert problems(case, seed=seqlen_k) == [], case


@pytest.mark.parametrize("layout", ("fused", "bhsd", "offset", "expanded"))
def test_layouts(layout):
    case = vary(layout=layout, heads_kv=2, batch=2, seqlen_q=70, seqlen_k=140, prefix_len=(0, 50))
    for head_dim in (64, 20):
        assert problems(dataclasses.replace(case, head_dim=head_dim)) == []


@pytest.mark.parametrize("dimension", (0, 1, 2))
def test_keys_that_share_memory(dimension):
    """Stride 0 fits a tensor map for batch rows and heads; a head whose keys are all one key is copied."""
    inputs = testing.build(vary(batch=2, heads_kv=2, seqlen_k=130))
    for name in ("k", "v"):
        tensor = getattr(inputs, name)
        setattr(inputs, name, tensor.narrow(dimension, 0, 1).expand(tensor.shape))
    got, _ = forward(inputs)
    truth = testing.oracle(inputs, None)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, None)  # noqa: E731
    assert testing.mismatches(got, truth, testing.attention_bounds(inputs, truth), eager) == []


@pytest.mark.parametrize(
    "mask", ({"key_range": ((10, 140),)}, {"window": 9}, {"key_flags": "holes"}, {"segments": "packed"})
)
def test_keys_that_no_query_sees_may_hold_nan(mask):
    case = vary(head_dim=128, seqlen_q=40, seqlen_k=300, alibi="mpt", **mask)
    inputs = testing.build(case)
    expected, _ = forward(inputs)
    unseen = ~inputs.visible().any(1)
    assert unseen.any() and not unseen.all()
    for tensor in (inputs.k, inputs.v):
        tensor[unseen] = torch.nan
    got, _ = forward(inputs)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("seqlen_q,seqlen_k", ((0, 5), (5, 0)))
def test_nothing_to_attend(seqlen_q, seqlen_k):
    got, _ = forward(vary(seqlen_q=seqlen_q, seqlen_k=seqlen_k, alibi="mpt"))
    assert (got["out"] == 0).all() and (got["lse"] == -torch.inf).all()


def test_the_same_bits_in_any_order():
    inputs = testing.build(vary(alibi="mpt", key_flags="holes", segments="packed", seqlen_q=200, seqlen_k=300))
    first, _ = forward(inputs, seed=1)
    for seed in (2, 3):
        again, _ = forward(inputs, seed=seed)
        assert torch.equal(first["out"], again["out"]) and torch.equal(first["lse"], again["lse"])


@pytest.mark.parametrize("head_dim", (64, 128))
def test_pruning_keeps_the_result(head_dim):
    """Steep slopes, a far prefix, outlying keys: the worst for a bound made of norms."""
    case = vary(seqlen_q=600, seqlen_k=1200, heads_q=1, head_dim=head_dim, alibi="mpt", prefix_len=(1200,))
    inputs = testing.build(case)
    inputs.alibi_slopes = torch.tensor([0.5])
    inputs.k[:, 3::97] *= 6
    truth = testing.oracle(inputs, None)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, None)  # noqa: E731
    work = []
    for prune in (False, True):
        got, session = forward(inputs, prune=prune)
        assert testing.mismatches(got, truth, testing.attention_bounds(inputs, truth), eager) == []
        work.append(session.kernels()["prefix_attn_fwd"]["wgmma"])
    assert 0.3 < work[1] / work[0] < 0.8


def random_case(seed):
    case = testing.random_case(seed)
    case = dataclasses.replace(case, dtype="float16" if seed % 2 and case.head_dim <= 64 else "bfloat16")
    if case.batch * case.heads_q * case.seqlen_q * case.seqlen_k > 200_000:
        case = dataclasses.replace(case, heads_q=case.heads_kv, seqlen_q=min(case.seqlen_q, 150))
    return case


@pytest.mark.parametrize("seed", range(20))
def test_random(seed):
    assert problems(random_case(seed + 11000), seed=seed, sum_order=seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 400))
def test_more_random(seed):
    assert problems(random_case(seed + 11000), seed=seed, sum_order=seed) == []


@pytest.mark.parametrize("name", ("alibi-prefix", "multi-query"))
def test_forward_and_backward_of_a_hopper_device(name):
    """Each takes the newest kernels that there are for it."""
    case = dataclasses.replace(STRUCTURED[name], dtype="bfloat16")
    inputs = testing.build(case)
    with operators.options(device=vars(attention.HOPPER)) as runs:
        results = testing.run(operators.prefix_attn, inputs, case.gradients)
    assert runs[0].counted["prefix_attn_fwd"]["wgmma"] > 0
    truth = testing.oracle(inputs, case.gradients)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, case.gradients)  # noqa: E731
    assert testing.mismatches(results, truth, testing.attention_bounds(inputs, truth), eager) == []


@pytest.mark.parametrize("multiprocessors", (1, 3))
@pytest.mark.parametrize("head_dim", (20, 64, 96, 128))
def test_blocks_that_work_on_several_query_tiles(head_dim, multiprocessors):
    """One per multiprocessor where tiles cost what their place says; some of these see no key."""
    mask = {"query_start": (-210, -20), "prefix_len": (0, 150)}
    case = vary(head_dim=head_dim, batch=2, heads_kv=2, seqlen_q=400, seqlen_k=330, alibi="mpt", **mask)
    inputs = testing.build(case)
    truth = testing.oracle(inputs, None)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, None)  # noqa: E731
    device = dataclasses.replace(attention.HOPPER, multiprocessors=multiprocessors)
    for seed in (0, 1):
        got, session = attention.forward(inputs, device=device, seed=seed)
        assert testing.mismatches(got, truth, testing.attention_bounds(inputs, truth), eager) == []
        assert session.kernels()["prefix_attn_fwd"]["blocks"] == multiprocessors


@pytest.mark.parametrize(
    "change", ({"key_range": ((10, 140),)}, {"key_flags": "holes"}, {"segments": "packed"}, {"head_dim": 256})
)
def test_tiles_of_unknown_cost_are_dealt_out_by_hardware(change):
    case = vary(seqlen_q=400, heads_kv=2, **change)
    _, session = attention.forward(testing.build(case), device=ONE)
    assert session.kernels()["prefix_attn_fwd"]["blocks"] == 2 * (400 // (192 if case.head_dim == 64 else 128) + 1)


def test_sums_that_truncate():
    assert problems(vary(alibi="mpt", prefix_len=(40,), head_dim=128), toward_zero=True) == []


# Several query tiles, also where no map holds the output; several lists; values to clear; no visible key; packed rows.
CALLS = (
    vary(seqlen_q=500, seqlen_k=700, heads_q=1, softmax_scale=3.0),  # maxima that grow
    vary(seqlen_q=500, seqlen_k=500, heads_q=1, head_dim=20, alibi="mpt"),
    vary(seqlen_q=130, seqlen_k=1200, heads_q=1, head_dim=128, alibi="mpt", prefix_len=(1200,), key_flags="holes"),
    vary(seqlen_q=70, seqlen_k=70, heads_q=1, key_range=((9, 9),)),
    vary(seqlen_q=9, seqlen_k=300, heads_q=8, segments="packed", alibi="mpt"),
)


def sites():
    """Barriers and waits ("file:line") and the calls that meet them."""
    found = {}
    for call in CALLS:
        _, session = forward(call, device=ONE)
        for site in session.kernels()["prefix_attn_fwd"]["synchronising"]:
            found.setdefault(site, []).append(call)
    return found


def is_needed(site, calls):
    for call in calls:
        inputs = testing.build(call)
        try:
            got, _ = forward(inputs, device=ONE, skip=site)
        except AssertionError:
            return True
        expected, _ = forward(inputs, device=ONE)
        if not all(torch.equal(got[name], expected[name]) for name in got):
            return True
    return False


def test_every_barrier_and_wait_is_needed():
    every = sites()
    assert len(every) > 20
    assert [site for site in sorted(every) if not is_needed(site, every[site])] == []
