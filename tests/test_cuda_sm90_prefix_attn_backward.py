"""The Hopper backward on the emulator: given the true out and lse, gradients within the bounds, no report."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from emulator import EmulatorError, attention
from internvl_kernels import testing
from internvl_kernels.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = Case(seqlen_q=96, seqlen_k=160, heads_q=2, heads_kv=1, head_dim=64, dtype="bfloat16")
STRUCTURED = testing.structured_cases()
ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("prefix_attn_bwd_kv", "prefix_attn_bwd_q")
problems = functools.partial(attention.backward_problems, device=attention.HOPPER)
backward = functools.partial(attention.backward, device=attention.HOPPER)


def vary(**changes):
    return dataclasses.replace(SMALL, **changes)


def call_of(case):
    """Arguments of ``backward``."""
    inputs = testing.build(case)
    return (inputs, *attention.saved(inputs, testing.oracle(inputs, None)))


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured(name):
    case = STRUCTURED[name]
    if case.heads_q == 4:
        case = dataclasses.replace(case, heads_q=2, heads_kv=min(case.heads_kv, 1 + case.seed % 2))
    case = dataclasses.replace(case, head_dim=32, dtype="float16" if case.seed % 3 == 0 else "bfloat16")
    assert problems(case, seed=case.seed) == []


@pytest.mark.parametrize("head_dim", (1, 20, 64, 72, 96, 100, 128, 136, 192, 200, 256))
def test_head_dims(head_dim):
    """Every tile size, whole and padded; above 128 the warpgroups share their keys."""
    case = vary(head_dim=head_dim, alibi="mpt", prefix_len=(30,), seqlen_q=70, seqlen_k=140)
    assert problems(case, seed=head_dim) == []


@pytest.mark.parametrize("key_flags,segments,window", (("holes", "packed", 0), ("random", None, 40)))
@pytest.mark.parametrize("head_dim", (96, 128, 256))
def test_general_masks_of_wide_heads(head_dim, key_flags, segments, window):
    case = vary(head_dim=head_dim, key_flags=key_flags, segments=segments, window=window, alibi="random")
    assert problems(case) == []


@pytest.mark.parametrize("seqlen_q", (1, 63, 65, 129))
def test_tile_edges(seqlen_q):
    for seqlen_k in (1, 64, 129):
        case = vary(seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=1, alibi="mpt", seed=seqlen_k)
        assert problems(case, seed=seqlen_k) == [], case


@pytest.mark.parametrize("layout", ("fused", "bhsd", "offset", "expanded"))
def test_layouts(layout):
    """What no tensor map describes is copied first."""
    case = vary(layout=layout, heads_kv=2, batch=2, seqlen_q=70, seqlen_k=70, prefix_len=(0, 50))
    for head_dim in (64, 20):
        assert problems(dataclasses.replace(case, head_dim=head_dim)) == []


@pytest.mark.parametrize("seqlen_q,seqlen_k", ((0, 5), (5, 0)))
@pytest.mark.parametrize("head_dim", (64, 256))
def test_nothing_to_attend(seqlen_q, seqlen_k, head_dim):
    inputs = testing.build(vary(seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim, alibi="mpt"))
    got, _ = backward(inputs, torch.zeros_like(inputs.q), torch.full((1, 2, seqlen_q), -torch.inf))
    assert all((gradient == 0).all() for gradient in got.values())


@pytest.mark.parametrize("head_dim", (64, 256))
def test_rows_and_keys_that_nobody_meets_hold_nan(head_dim):
    """Rows without a visible key and keys without a query: their contents, out and gradients never matter."""
    case = vary(batch=2, key_range=((100, 160), (7, 7)), segments="packed", seqlen_q=160, alibi="mpt")
    inputs = testing.build(dataclasses.replace(case, head_dim=head_dim))
    truth = testing.oracle(inputs, "both")
    out, lse = attention.saved(inputs, truth)
    empty = ~inputs.visible().any(-1)
    assert empty.any() and not empty.all()
    poisoned = dataclasses.replace(inputs, q=inputs.q.clone(), grad_out=inputs.grad_out.clone())
    for tensor in (poisoned.q, poisoned.grad_out, out):
        tensor[empty] = torch.nan
    got, _ = backward(poisoned, out, lse)
    bounds = testing.attention_bounds(inputs, truth)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, "both")  # noqa: E731
    assert testing.mismatches(got, {name: truth[name] for name in got}, bounds, eager) == []


def test_the_same_bits_in_any_order():
    case = vary(alibi="mpt", key_flags="holes", segments="packed", heads_q=4, heads_kv=2)
    for head_dim in (64, 256):
        call = call_of(dataclasses.replace(case, head_dim=head_dim))
        first, _ = backward(*call, seed=1)
        again, _ = backward(*call, seed=2)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_pruning_keeps_the_result():
    """Steep slopes, a far prefix, outlying keys: the worst for a bound made of norms."""
    case = vary(seqlen_q=128, seqlen_k=1100, query_start=(256,), alibi="mpt", prefix_len=(1100,))
    inputs = testing.build(case)
    inputs.alibi_slopes = torch.tensor([0.5, -0.01])  # nothing may be skipped under the second
    inputs.k[:, 3::97] *= 6
    work = []
    for prune in (False, True):
        assert problems(case, inputs, prune=prune) == []
        saved = attention.saved(inputs, testing.oracle(inputs, None))
        kernels = backward(inputs, *saved, prune=prune)[1].kernels()
        work.append([kernels[name]["wgmma"] for name in KERNELS])
    assert all(0.5 < pruned / full < 0.9 for full, pruned in zip(*work, strict=True))


def test_sums_that_truncate():
    assert problems(vary(alibi="mpt", prefix_len=(40,)), toward_zero=True) == []


@pytest.mark.parametrize("seed", range(12))
def test_random(seed):
    case = testing.random_case(seed + 9100)
    case = dataclasses.replace(case, dtype="bfloat16" if seed % 2 or case.head_dim > 64 else "float16")
    if case.batch * case.heads_q * case.seqlen_q * case.seqlen_k > 100_000:
        case = dataclasses.replace(case, heads_q=case.heads_kv, seqlen_q=min(case.seqlen_q, 100))
    assert problems(case, seed=seed, sum_order=seed) == []


# Several tiles; rows and keys that nobody meets; no tile at all; wide heads; two lists of tiles.
MUTATED = (
    vary(seqlen_q=400, seqlen_k=400, heads_q=1, alibi="mpt"),
    vary(seqlen_q=200, seqlen_k=200, heads_q=1, key_range=((100, 150),)),
    vary(seqlen_q=8, seqlen_k=64, heads_q=1, key_range=((9, 9),)),
    vary(seqlen_q=200, seqlen_k=200, heads_q=1, head_dim=192, alibi="mpt"),
    vary(seqlen_q=70, seqlen_k=33000, heads_q=1, head_dim=8, window=40),
    vary(seqlen_q=1, seqlen_k=9, heads_q=260, head_dim=8, window=9),
)


@functools.cache
def mutated():
    return [call_of(case) for case in MUTATED]


@functools.cache
def sites():
    """Barriers, fences and waits ("file:line") of the two big kernels, and which calls execute them."""
    found = {}
    for number, call in enumerate(mutated()):
        for name, kernel in backward(*call)[1].kernels().items():
            for site in kernel["synchronising"] if name in KERNELS else ():
                if not is_for_the_assembler(site):
                    found.setdefault(site, set()).add(number)
    return found


def is_for_the_assembler(site):
    path, line = site.rsplit(":", 1)
    return "// for the assembler" in (ROOT / path).read_text().splitlines()[int(line) - 1]


def noticed(site):
    for number in sorted(sites()[site]):
        try:
            backward(*mutated()[number], skip=site)
        except EmulatorError:
            return True
    return False


def test_every_barrier_fence_and_wait_is_needed():
    assert len(sites()) >= 40
    assert [site for site in sorted(sites()) if not noticed(site)] == []


@pytest.mark.parametrize("head_dim", (64, 128, 192, 256))
def test_shared_memory_has_no_bank_conflicts(head_dim):
    """Not 96: its panels of 32 columns cost a few wavefronts more, once per block, where gradients are stored."""
    call = call_of(vary(seqlen_q=128, seqlen_k=128, heads_q=1, head_dim=head_dim, alibi="mpt"))
    _, session = backward(*call, bank_conflicts=True)
    for name in KERNELS:
        for site, (_, parts, ideal) in session.kernels()[name]["accesses"].items():
            if "shared" in site or "cp.async" in site:
                assert parts == ideal, site
