"""semantics.py against the formula written out pair by pair, then every mirror against semantics.py."""

import itertools

import numpy
import pytest
import torch
from internvl_kernels import semantics

_C = pytest.importorskip("internvl_kernels._C")

WINDOWS = (0, 1, 2, 3, 9)


def formula(seqlen_q, seqlen_k, first, valid, bidirectional, window, segments=None):
    """visible(i, j) from the design's sentence, one pair at a time."""
    rows = []
    for i in range(seqlen_q):
        p, row = first + i, []
        for j in range(seqlen_k):
            seen = bool(valid[j])
            if segments is not None:
                seen = seen and 0 <= p < seqlen_k and segments[p] == segments[j]
            in_past = j <= p
            recent = True if window == 0 else p - j < window
            row.append(seen and (bool(bidirectional[j]) or (in_past and recent)))
        rows.append(row)
    return numpy.array(rows, dtype=bool).reshape(seqlen_q, seqlen_k)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def spec(seqlen_q, seqlen_k, first, window, **terms):
    mask = semantics.visible_mask(1, seqlen_q, seqlen_k, query_start=int32(first), window=window, **terms)
    return mask[0].numpy()


def mirror(seqlen_q, seqlen_k, first, window, prefix=0, start=0, end=None, flags=None, segments=None):
    arrays = {}
    if flags is not None:
        arrays["key_flags"] = numpy.array(flags, dtype=numpy.uint8)
    if segments is not None:
        arrays["segment_ids"] = numpy.array(segments, dtype=numpy.int32)
    end = seqlen_k if end is None else end
    return _C.visible_mask(
        seqlen_q, seqlen_k, query_start=first, prefix_len=prefix, start=start, end=end, window=window, **arrays
    )


def check(seqlen_q, seqlen_k, first, window, prefix=0, key_range=None, flags=None, segments=None):
    start, end = key_range or (0, seqlen_k)
    j = range(seqlen_k)
    if flags is None:
        valid, bidirectional = [start <= x < end for x in j], [x < prefix for x in j]
        terms = {"prefix_len": int32(prefix)}
        if key_range is not None:
            terms["key_range"] = int32(start, end)[None]
    else:
        valid, bidirectional = [f & 1 for f in flags], [f & 2 for f in flags]
        terms = {"key_flags": torch.tensor([flags], dtype=torch.uint8)}
    if segments is not None:
        terms["segment_ids"] = int32(*segments)[None]
    wanted = formula(seqlen_q, seqlen_k, first, valid, bidirectional, window, segments)
    given = (seqlen_q, seqlen_k, first, window, prefix, key_range, flags, segments)
    assert numpy.array_equal(spec(seqlen_q, seqlen_k, first, window, **terms), wanted), given
    assert numpy.array_equal(mirror(seqlen_q, seqlen_k, first, window, prefix, start, end, flags, segments), wanted), (
        given
    )


@pytest.mark.parametrize("seqlen_k", range(1, 6))
def test_visible_compact_form(seqlen_k):
    """Every query start, prefix and key range (empty, past the end) up to five by five."""
    for seqlen_q, window in itertools.product((1, 2, 5), WINDOWS):
        starts = {-seqlen_q - 1, -1, 0, seqlen_k - seqlen_q, seqlen_k - 1, seqlen_k, seqlen_k + 3}
        for first, prefix in itertools.product(starts, (-2, 0, 1, seqlen_k // 2, seqlen_k, seqlen_k + 4)):
            ends = (seqlen_k, seqlen_k + 5)
            for key_range in (*itertools.product((0, 1, 3), ends), (0, 1), (2, 4), (2, 2), (0, 0), (9, 12)):
                check(seqlen_q, seqlen_k, first, window, prefix, key_range)


@pytest.mark.parametrize("seqlen_k", range(1, 5))
def test_visible_flags(seqlen_k):
    """Every pattern of key flags."""
    for flags in itertools.product(range(4), repeat=seqlen_k):
        for window, first in itertools.product((0, 2), (-1, 0, seqlen_k - 1)):
            check(3, seqlen_k, first, window, flags=flags)


@pytest.mark.parametrize("seqlen_k", range(1, 5))
def test_visible_segments(seqlen_k):
    """Every pattern of three segment ids, with positions on both sides of the keys."""
    for segments in itertools.product((-1, 0, 7), repeat=seqlen_k):
        for prefix, first, window in itertools.product((0, seqlen_k // 2 + 1), (-1, seqlen_k - 2), (0, 2)):
            check(3, seqlen_k, first, window, prefix, segments=segments)
    for flags in itertools.product(range(4), repeat=min(seqlen_k, 3)):
        check(3, len(flags), 0, 0, flags=flags, segments=[0, 1, 0][: len(flags)])


def test_visible_far_positions():
    """int32 data at its limits, and unused bits of the flags."""
    for first, prefix, window in itertools.product((-(2**31), 2**31 - 1), (-(2**31), 2**31 - 1), (0, 3, 2**30)):
        check(2, 3, first, window, prefix, (0, 2**31 - 1))
    check(3, 3, 0, 0, flags=(0xFC, 0xFD, 0xFE))


def test_default_query_start_lets_the_last_query_meet_the_last_key():
    for seqlen_q, seqlen_k in ((1, 5), (5, 5), (7, 3)):
        seen = semantics.visible_mask(1, seqlen_q, seqlen_k)[0]
        assert torch.equal(seen, torch.ones(seqlen_q, seqlen_k).tril(seqlen_k - seqlen_q).bool())


def test_batch_rows_are_independent():
    terms = {
        "prefix_len": int32(1, 3, 0),
        "key_range": torch.tensor([[0, 4], [1, 9], [2, 2]], dtype=torch.int32),
        "query_start": int32(0, -1, 2),
        "segment_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [2, 2, 2, 2]], dtype=torch.int32),
    }
    whole = semantics.visible_mask(3, 4, 4, window=2, **terms)
    for b in range(3):
        one = semantics.visible_mask(1, 4, 4, window=2, **{n: t[b : b + 1] for n, t in terms.items()})
        assert torch.equal(whole[b : b + 1], one)


def class_of(seen):
    if not seen.any():
        return semantics.TILE_EMPTY
    return semantics.TILE_FULL if seen.all() else semantics.TILE_PARTIAL


@pytest.mark.parametrize("seqlen_k", (1, 2, 5, 6))
def test_tile_plan_is_exact_for_the_compact_form(seqlen_k):
    """The class of every tile equals counting its visible pairs; spec and mirror agree."""
    for seqlen_q, block_m, block_n, window in itertools.product((1, 4, 6), (1, 2, 4), (1, 2, 3), (0, 1, 3)):
        for first, prefix, (start, end) in itertools.product(
            (-3, 0, seqlen_k - seqlen_q, seqlen_k + 1),
            (-1, 0, 1, 3, seqlen_k, seqlen_k + 3),
            ((0, seqlen_k), (1, 4), (3, 3), (0, 2), (2, 99)),
        ):
            plan = _C.tile_plan(
                seqlen_q,
                seqlen_k,
                block_m,
                block_n,
                query_start=first,
                prefix_len=prefix,
                start=start,
                end=end,
                window=window,
            )
            j = range(seqlen_k)
            valid, bidirectional = [start <= x < end for x in j], [x < prefix for x in j]
            seen = formula(seqlen_q, seqlen_k, first, valid, bidirectional, window)
            for m, n in numpy.ndindex(plan.shape):
                i_hi, j_hi = min((m + 1) * block_m, seqlen_q), min((n + 1) * block_n, seqlen_k)
                tile = seen[m * block_m : i_hi, n * block_n : j_hi]
                arguments = (first + m * block_m, first + i_hi - 1, n * block_n, j_hi, prefix, start, end, window)
                given = (seqlen_q, seqlen_k, arguments)
                assert plan[m, n] == class_of(tile), given
                assert semantics.classify_tile(*arguments) == plan[m, n], given


@pytest.mark.parametrize("keys", (1, 2, 3, 4))
def test_flag_tiles_are_never_wrong(keys):
    """Conservative: empty and full are true; and exact where the flags are uniform."""
    for flags, p_lo, rows, window in itertools.product(
        itertools.product(range(4), repeat=keys), (-2, 0, 1, keys), (1, 3), (0, 1, 2)
    ):
        valid = [bool(f & 1) for f in flags]
        opened = [bool(f & 2) for f, real in zip(flags, valid, strict=True) if real]
        summary = (any(valid), all(valid), any(opened), all(opened))
        arguments = (p_lo, p_lo + rows - 1, 0, keys, *summary, window)
        found = semantics.classify_tile_flags(*arguments)
        assert _C.classify_tile_flags(*arguments) == found, arguments
        truth = class_of(formula(rows, keys, p_lo, valid, [f & 2 for f in flags], window))
        assert found in (truth, semantics.TILE_PARTIAL), (flags, arguments)
        if len(set(flags)) == 1:
            assert found == truth, (flags, arguments)


def test_segment_tiles_are_never_wrong():
    for queries, keys in itertools.product(itertools.product((-1, 0, 2), repeat=3), repeat=2):
        arguments = (min(queries), max(queries), min(keys), max(keys))
        found = semantics.classify_tile_segments(*arguments)
        assert _C.classify_tile_segments(*arguments) == found
        truth = class_of(numpy.array([[a == b for b in keys] for a in queries]))
        assert found in (truth, semantics.TILE_PARTIAL), (queries, keys)
        if len(set(queries)) == len(set(keys)) == 1:
            assert found == truth


def test_combined_classes_are_never_wrong():
    """Over all pairs of 2 x 1 masks: the class of the conjunction, or partial."""
    masks = [numpy.array(bits, dtype=bool) for bits in itertools.product((0, 1), repeat=2)]
    for a, b in itertools.product(masks, repeat=2):
        found = semantics.combine_classes(class_of(a), class_of(b))
        assert found == _C.combine_classes(class_of(a), class_of(b))
        assert found in (class_of(a & b), semantics.TILE_PARTIAL)
    assert semantics.combine_classes(semantics.TILE_FULL, semantics.TILE_FULL) == semantics.TILE_FULL
    assert semantics.combine_classes(semantics.TILE_FULL, semantics.TILE_EMPTY) == semantics.TILE_EMPTY


def test_key_bounds():
    """visible_key_end and causal_key_begin hold for every mask and are reached by some."""
    for p, prefix, end, window in itertools.product(range(-3, 8), range(-2, 9), range(0, 8), WINDOWS):
        stop, begin = semantics.visible_key_end(p, prefix, end), semantics.causal_key_begin(p, window)
        assert stop == _C.visible_key_end(p, prefix, end)
        assert begin == _C.causal_key_begin(p, window)
        j = range(12)
        row = formula(1, 12, p, [x < end for x in j], [x < prefix for x in j], 0)[0]
        assert max(stop, 0) == (row.nonzero()[0].max() + 1 if row.any() else 0)
        row = formula(1, 12, p, [True] * 12, [False] * 12, window)[0]
        assert not row.any() or row.nonzero()[0].min() == begin


def test_alibi_bias_is_equal_to_the_bit():
    """One multiplication, one rounding (of distances up to 2^24): spec in fp32, mirror, exact product rounded."""
    slopes = torch.cat([semantics.mpt_alibi_slopes(12), torch.rand(20), torch.tensor([0.0, -0.0, -0.3, 1e4, 1e30])])
    for slope in slopes.tolist():
        for p, j in itertools.product((-5, 0, 7, 1000, 16777216), (0, 3, 7, 999, 16777215)):
            exact = numpy.float32(-float(numpy.float32(slope)) * abs(p - j))
            found = numpy.float32(_C.alibi_bias(slope, p, j))
            in_torch = semantics.alibi_bias(torch.tensor(slope), torch.tensor(p), torch.tensor(j)).numpy()
            assert in_torch.dtype == numpy.float32
            assert found.tobytes() == in_torch.tobytes(), (slope, p, j)
            assert found == exact, (slope, p, j)
    bias = semantics.bias_matrix(torch.tensor([0.5, 2.0]), torch.tensor([[1, 2]]), 4)
    assert bias.tolist() == [[[[-0.5, 0, -0.5, -1], [-1, -0.5, 0, -0.5]], [[-2, 0, -2, -4], [-4, -2, 0, -2]]]]


def test_count_visible_pairs():
    for seqlen_q, seqlen_k, prefix, window in ((7, 7, 3, 0), (300, 520, 100, 0), (300, 520, 0, 17), (4, 2, 9, 1)):
        j = range(seqlen_k)
        seen = formula(seqlen_q, seqlen_k, seqlen_k - seqlen_q, [1] * seqlen_k, [x < prefix for x in j], window)
        counted = semantics.count_visible_pairs(
            seqlen_q, seqlen_k, batch=2, prefix_len=int32(prefix, prefix), window=window
        )
        assert counted == 2 * seen.sum()


def test_mpt_alibi_slopes():
    """Powers of two for eight heads; the interleaved order of Press et al. for other numbers."""
    assert semantics.mpt_alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    twelve = [2.0 ** -(0.5 * n) for n in range(1, 17)]
    wanted = (twelve[1::2] + twelve[0::2])[:12]
    assert semantics.mpt_alibi_slopes(12).tolist() == pytest.approx(wanted, rel=1e-6)
