"""The CUDA decode kernels on the emulator: few query rows, keys split over blocks, merged by the last to arrive."""

import dataclasses
import math

import pytest
import torch
from emulator import attention
from internvl_kernels import testing
from internvl_kernels.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KERNEL = "prefix_attn_decode"
TOKEN = Case(seqlen_q=1, seqlen_k=500, heads_q=2, heads_kv=1, head_dim=64, dtype="bfloat16")


def vary(**changes):
    return dataclasses.replace(TOKEN, **changes)


class Decode:
    """The decode kernel of an architecture."""

    def __init__(self, arch: str):
        self.hopper = arch == "sm90"
        self.device = attention.HOPPER if self.hopper else attention.Device()

    def forward(self, inputs, multiprocessors=132, **options):
        device = dataclasses.replace(self.device, multiprocessors=multiprocessors)
        got, session = attention.forward(inputs, device=device, **options)
        counts = session.kernels().get(KERNEL)
        assert counts, "another kernel took the call"
        assert (counts["mma"] == 0) if self.hopper else (counts["wgmma"] == 0)
        return got, session

    def problems(self, case, multiprocessors=132, inputs=None, **options):
        inputs = inputs or testing.build(case)
        got, _ = self.forward(inputs, multiprocessors, **options)
        truth = testing.oracle(inputs, None)
        eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, None)  # noqa: E731
        return testing.mismatches(got, truth, testing.attention_bounds(inputs, truth), eager)


@pytest.fixture(params=("sm80", "sm90"))
def decode(request):
    return Decode(request.param)


def splits(session, tiles):
    """How many blocks shared the keys of one tile of query rows."""
    return session.kernels()[KERNEL]["blocks"] // tiles


def bytes_read(session):
    """Of Q, K and V, by asynchronous copies."""
    return session.kernels()[KERNEL]["cp_async_bytes"] + session.kernels()[KERNEL]["bulk_load_bytes"]


FORMS = {
    "causal": vary(),
    "inside": vary(query_start=(300,)),
    "padded": vary(batch=2, key_range=((0, 321), (200, 500)), query_start=(320, 499)),
    "prefix": vary(seqlen_q=3, prefix_len=(450,), query_start=(20,)),
    "full": vary(seqlen_q=2, prefix_len=(500,)),
    "flags": vary(batch=2, key_flags="random"),
    "flags-holes": vary(seqlen_q=4, key_flags="holes", query_start=(250,)),
    "flags-none": vary(key_flags="none"),
    "segments": vary(batch=2, segments="packed"),
    "segments-flags": vary(seqlen_q=5, segments="interleaved", key_flags="holes"),
    "segments-outside": vary(seqlen_q=8, segments="packed", query_start=(-3,), prefix_len=(90,)),
    "window": vary(window=70),
    "window-prefix": vary(seqlen_q=3, window=5, prefix_len=(64,)),
    "alibi": vary(alibi="mpt"),
    "alibi-both-sides": vary(seqlen_q=3, alibi="mpt", prefix_len=(500,), query_start=(240,)),
    "alibi-negative": vary(alibi="negative"),
    "alibi-steep": vary(alibi="steep"),
    "alibi-flags-segments": vary(seqlen_q=2, alibi="random", key_flags="holes", segments="packed"),
    "scale-negative": vary(softmax_scale=-0.3),
    "scale-zero": vary(softmax_scale=0.0, alibi="mpt"),
    "some rows empty": vary(seqlen_q=6, query_start=(-3,)),
    "all rows empty": vary(batch=2, key_range=((50, 50), (500, 500))),
    "behind the keys": vary(seqlen_q=2, query_start=(900,)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(decode, name):
    """Every form of the mask, with all keys in one block and with the keys split, some splits empty."""
    case = dataclasses.replace(FORMS[name], seed=len(name), dtype="float16" if len(name) % 3 == 0 else "bfloat16")
    for multiprocessors in (1, 132):
        assert decode.problems(case, multiprocessors, seed=len(name)) == []


@pytest.mark.parametrize("seqlen_q", range(1, 9))
def test_rows(decode, seqlen_q):
    """Rows of 1 to 64, each share of the four warps between rows and keys; one token of more heads."""
    for group in (1, 3, 8):
        case = vary(seqlen_q=seqlen_q, heads_q=group, seqlen_k=330, alibi="mpt", seed=group)
        assert decode.problems(case) == [], case


@pytest.mark.parametrize("group", (16, 17, 32, 33, 64, 65, 71))
def test_groups(decode, group):
    """The last two are more than a tile of rows."""
    case = vary(heads_q=2 * group, heads_kv=2, seqlen_k=330, alibi="random", query_start=(200,), seed=group)
    assert decode.problems(case) == []


@pytest.mark.parametrize("seqlen_k", (1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 256, 257, 320, 321))
def test_key_lengths(decode, seqlen_k):
    for seqlen_q in (1, 4):
        assert decode.problems(vary(seqlen_q=seqlen_q, seqlen_k=seqlen_k, seed=seqlen_k)) == []


@pytest.mark.parametrize("head_dim", (1, 8, 20, 64, 72, 96, 100, 128, 136, 192, 256))
def test_head_dims(decode, head_dim):
    """Each tile of query rows that is compiled, and two of them at the largest head dims."""
    for heads, seqlen_q in ((2, 1), (5, 4), (8, 7)):
        case = vary(head_dim=head_dim, heads_q=heads, seqlen_q=seqlen_q, alibi="mpt", seqlen_k=400)
        assert decode.problems(case, seed=head_dim) == []


@pytest.mark.parametrize("layout", ("fused", "bhsd", "offset", "expanded"))
def test_layouts(decode, layout):
    for head_dim in (64, 20):
        case = vary(layout=layout, head_dim=head_dim, batch=2, heads_q=3, heads_kv=3, seqlen_q=2)
        assert decode.problems(case) == []


@pytest.mark.parametrize("dimension", (0, 1, 2))
def test_keys_that_share_memory(decode, dimension):
    """Batch rows, keys or heads with stride 0."""
    inputs = testing.build(vary(batch=2, heads_kv=2, seqlen_k=330))
    for name in ("k", "v"):
        tensor = getattr(inputs, name)
        setattr(inputs, name, tensor.narrow(dimension, 0, 1).expand(tensor.shape))
    assert decode.problems(None, inputs=inputs) == []


@pytest.mark.parametrize(
    "mask", ({"key_range": ((10, 340),)}, {"window": 9}, {"key_flags": "holes"}, {"segments": "packed"})
)
def test_keys_that_no_query_sees_may_hold_nan(decode, mask):
    inputs = testing.build(vary(seqlen_q=3, seqlen_k=400, alibi="mpt", **mask))
    expected, _ = decode.forward(inputs)
    unseen = ~inputs.visible().any(1)
    assert unseen.any() and not unseen.all()
    for tensor in (inputs.k, inputs.v):
        tensor[unseen] = torch.nan
    got, _ = decode.forward(inputs)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_references_that_move(decode):
    """Scores that grow from tile to tile by more than the exponents' slack, and some that do not."""
    inputs = testing.build(vary(seqlen_q=3, heads_q=4, seqlen_k=700))
    inputs.k *= torch.linspace(16, 0, 700)[None, :, None, None].bfloat16()
    for multiprocessors in (1, 132):
        assert decode.problems(None, multiprocessors, inputs) == []


def test_sums_that_truncate(decode):
    assert decode.problems(vary(alibi="mpt", seqlen_q=3, head_dim=128), toward_zero=True) == []


def test_no_keys(decode):
    got, _ = decode.forward(testing.build(vary(seqlen_q=5, seqlen_k=0, alibi="mpt")))
    assert (got["out"] == 0).all() and (got["lse"] == -torch.inf).all()


def test_who_serves_what():
    """One token, or at most 64 rows of a KV head; on Hopper by its own kernel."""
    for device in (attention.Device(), attention.HOPPER):
        for changes, few in (({}, True), ({"seqlen_q": 32}, True), ({"seqlen_q": 33}, False), ({"heads_q": 66}, True)):
            _, session = attention.forward(testing.build(vary(**changes, seqlen_k=64)), device=device)
            assert (KERNEL in session.kernels()) == few
            assert (session.kernels()[KERNEL if few else "prefix_attn_fwd"]["wgmma"] > 0) == (
                device is attention.HOPPER
            )


def wanted_splits(blocks, key_tiles, slots):
    """The rule of NOTES.md in other words: fewest splits within 85 % of the best use of whole waves."""
    if blocks >= 0.8 * slots or key_tiles <= 4:
        return 1
    use = {}
    for count in range(1, min(128, slots, key_tiles) + 1):
        if math.ceil(key_tiles / count) not in {math.ceil(key_tiles / fewer) for fewer in use}:
            use[count] = blocks * count / slots / math.ceil(blocks * count / slots)
    return min(count for count, share in use.items() if share >= 0.85 * max(use.values()))


def test_number_of_splits(decode):
    """What a device takes at once, two blocks per multiprocessor, decides; every number of splits is right."""
    seen = set()
    for multiprocessors in (1, 2, 3, 4, 6, 7, 10, 132):
        for batch in (1, 2):
            case = vary(batch=batch, seqlen_k=700, alibi="mpt", seed=multiprocessors)
            _, session = decode.forward(testing.build(case), multiprocessors)
            assert splits(session, batch) == wanted_splits(batch, 11, 2 * multiprocessors)
            assert decode.problems(case, multiprocessors) == []
            seen.add(splits(session, batch))
    assert {1, 2, 3, 4, 6, 11} <= seen


def test_windows_bound_the_splits(decode):
    """Behind a window of 100 keys at most three tiles count: nothing to split."""
    _, session = decode.forward(testing.build(vary(seqlen_k=5000, window=100)))
    assert splits(session, 1) == 1


def test_the_same_bits_whoever_comes_last(decode):
    """Orders of blocks, warps and lanes are the seed's; the sums are not."""
    inputs = testing.build(vary(seqlen_q=3, seqlen_k=900, alibi="mpt"))
    results = [decode.forward(inputs, seed=seed)[0] for seed in range(5)]
    for other in results[1:]:
        assert torch.equal(other["out"], results[0]["out"]) and torch.equal(other["lse"], results[0]["lse"])


def steep_inputs(slopes):
    """Two steep heads and a token that has met 2048 keys, some of them outliers."""
    inputs = testing.build(vary(seqlen_q=2, seqlen_k=2048, heads_q=2, heads_kv=2))
    inputs.alibi_slopes = torch.tensor(slopes)
    inputs.k[:, 3::197] *= 6
    return inputs


@pytest.mark.parametrize("multiprocessors", (1, 2))
def test_pruning_leaves_far_tiles_out(decode, multiprocessors):
    """In one block, and in splits, of which each finds the bound at the nearest keys."""
    inputs = steep_inputs([0.5, 0.25])
    read = {}
    for prune in (False, True):
        assert decode.problems(None, multiprocessors, inputs, prune=prune) == []
        _, session = decode.forward(inputs, multiprocessors, prune=prune)
        read[prune] = bytes_read(session)
    assert read[True] < 0.4 * read[False]


def test_flat_heads_are_not_pruned(decode):
    """Whose keys would all be read twice for nothing."""
    assert decode.problems(None, 1, steep_inputs([0.5, 0.01])) == []
    norms = {}
    for flatter in (0.25, 0.01):
        _, session = decode.forward(steep_inputs([0.5, flatter]), 1)
        norms[flatter] = session.kernels()["key_norms"]["ld_global_bytes"]
    assert norms[0.01] < 0.6 * norms[0.25]


def test_small_calls_are_not_pruned(decode):
    """Below half a mebibyte per multiprocessor the norms cost more than they save."""
    _, session = decode.forward(steep_inputs([0.5, 0.25]), 132)
    assert "key_norms" not in session.kernels()


def test_keys_and_values_are_read_once(decode):
    """By the whole group together: every byte of K and V once, and Q in each split."""
    case = vary(heads_q=16, heads_kv=1, seqlen_k=640, head_dim=128)
    _, session = decode.forward(testing.build(case))
    rows = 2 * case.seqlen_k + 16 * splits(session, 1)
    assert bytes_read(session) == rows * case.head_dim * 2


@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
def test_no_bank_conflicts(decode, head_dim):
    for heads in (8, 60):
        inputs = testing.build(vary(head_dim=head_dim, heads_q=heads, seqlen_k=128, alibi="mpt"))
        _, session = decode.forward(inputs, bank_conflicts=True)
        kernel = session.kernels()[KERNEL]
        assert kernel["ldmatrix_wavefronts"] == 4 * kernel["ldmatrix"]
        for site, (_, parts, ideal) in kernel["accesses"].items():
            if "shared" in site and "sm90" in site:
                assert parts == ideal, site


# Several tiles and splits, no tile, pruning, lists with nothing in them, values that are cleared.
CALLS = (
    (vary(seqlen_q=2, seqlen_k=900, heads_q=3, heads_kv=1), 132),
    (vary(key_range=((9, 9),)), 132),
    (None, 1),
    (vary(seqlen_k=17000, heads_q=1, key_flags="holes", window=40), 1),
)


def calls():
    for case, multiprocessors in CALLS:
        inputs = testing.build(case, poison=case.window == 0) if case else steep_inputs([0.5, 0.25])
        yield inputs, multiprocessors


def sites(decode):
    """Barriers and waits ("file:line") of the kernel's own files, and the calls that meet them."""
    found = {}
    for call in calls():
        _, session = decode.forward(*call)
        for site in session.kernels()[KERNEL]["synchronising"]:
            if "attn_decode" in site and "producer" not in site:
                found.setdefault(site, []).append(call)
    return found


def is_needed(decode, site, met):
    for inputs, multiprocessors in met:
        try:
            got, _ = decode.forward(inputs, multiprocessors, skip=site)
        except AssertionError:
            return True
        expected, _ = decode.forward(inputs, multiprocessors)
        if not all(torch.equal(got[name], expected[name]) for name in got):
            return True
    return False


def test_a_missing_barrier_or_wait_is_found(decode):
    """Every one in the kernel is needed: the loop's, the merge's, and those around the ticket."""
    every = sites(decode)
    assert len(every) >= 14
    assert [site for site in sorted(every) if not is_needed(decode, site, every[site])] == []


def random_case(seed):
    """A case of few rows, of any kind."""
    case = testing.random_case(seed)
    group = case.heads_q // case.heads_kv
    rows = seed % 7 and max(1, min(case.seqlen_q, 64 // group))
    return dataclasses.replace(
        case, seqlen_q=rows or 1, dtype="float16" if seed % 2 and case.head_dim <= 64 else "bfloat16"
    )


@pytest.mark.parametrize("seed", range(10))
def test_random(decode, seed):
    assert decode.problems(random_case(seed + 21000), (1, 5, 132)[seed % 3], seed=seed, sum_order=seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 300))
def test_more_random(decode, seed):
    assert decode.problems(random_case(seed + 21000), (1, 5, 132)[seed % 3], seed=seed, sum_order=seed) == []
