"""triton_kernels/mask.py against semantics.py, exhaustively over small arguments, and prune.py against prune.h."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from internvl_kernels import _C, semantics
from internvl_kernels.triton_kernels import mask, prune, tiles

BLOCK = 4096
POSITIONS, KEYS, WINDOWS = (-3, 0, 1, 2, 5), (0, 1, 3, 4), (0, 1, 2, 7)


@triton.jit
def probe_kernel(out_ptr, arguments_ptr, n, FUNCTION: tl.constexpr, ARITY: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = FUNCTION(arguments[0, i], arguments[1, i], ...)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    a = tl.load(arguments_ptr + i, mask=inside, other=0)
    b = tl.load(arguments_ptr + n + i, mask=inside & (ARITY > 1), other=0)
    c = tl.load(arguments_ptr + 2 * n + i, mask=inside & (ARITY > 2), other=0)
    d = tl.load(arguments_ptr + 3 * n + i, mask=inside & (ARITY > 3), other=0)
    e = tl.load(arguments_ptr + 4 * n + i, mask=inside & (ARITY > 4), other=0)
    f = tl.load(arguments_ptr + 5 * n + i, mask=inside & (ARITY > 5), other=0)
    g = tl.load(arguments_ptr + 6 * n + i, mask=inside & (ARITY > 6), other=0)
    h = tl.load(arguments_ptr + 7 * n + i, mask=inside & (ARITY > 7), other=0)
    if ARITY == 1:
        found = FUNCTION(a)
    elif ARITY == 2:
        found = FUNCTION(a, b)
    elif ARITY == 3:
        found = FUNCTION(a, b, c)
    elif ARITY == 4:
        found = FUNCTION(a, b, c, d)
    elif ARITY == 5:
        found = FUNCTION(a, b, c, d, e)
    elif ARITY == 6:
        found = FUNCTION(a, b, c, d, e, f)
    elif ARITY == 8:
        found = FUNCTION(a, b, c, d, e, f, g, h)
    else:
        j = tl.load(arguments_ptr + 8 * n + i, mask=inside, other=0)
        found = FUNCTION(a, b, c, d, e != 0, f != 0, g != 0, h != 0, j)
    tl.store(out_ptr + i, found.to(out_ptr.dtype.element_ty), mask=inside)


def evaluate(function, rows, dtype=torch.int64, result=torch.int64):
    """The jitted function on every row of arguments."""
    rows = list(rows)
    columns = torch.tensor(rows, dtype=dtype).T.contiguous()
    out = torch.full((len(rows),), -99, dtype=result)
    grid = (triton.cdiv(len(rows), BLOCK),)
    probe_kernel[grid](out, columns, len(rows), FUNCTION=function, ARITY=columns.shape[0], BLOCK=BLOCK)
    return out


def same(name, rows):
    rows = list(rows)
    found = evaluate(getattr(mask, name), rows).tolist()
    wanted = [int(getattr(semantics, name)(*row)) for row in rows]
    wrong = [(row, f, w) for row, f, w in zip(rows, found, wanted, strict=True) if f != w]
    assert not wrong, f"{name}: {len(wrong)} of {len(rows)}, first {wrong[0]}"


def spans(values, longest=3):
    return [(lo, hi) for lo in values for hi in range(lo, lo + longest)]


def test_elementary_terms():
    far = (-(2**40), -(2**31), -1, 0, 1, 2, 9, 2**31 - 1, 2**40)
    same("query_position", itertools.product(far, far))
    same("valid_in_range", itertools.product(far, far, far))
    same("bidirectional_in_prefix", itertools.product(far, far))
    same("causal", itertools.product(far, far, (0, 1, 2, 3, 9, 2**30)))
    for name in ("flag_valid", "flag_bidirectional"):
        same(name, itertools.product(range(256)))


def test_visible_is_the_rule():
    rows = list(itertools.product((0, 1), repeat=4))
    assert evaluate(mask.visible, rows).tolist() == [a & b & (c | d) for a, b, c, d in rows]


def test_causal_runs_and_key_bounds():
    rows = [(*p, j, end, w) for p in spans(POSITIONS) for j in KEYS for end in (j + 1, j + 3) for w in WINDOWS]
    same("causal_reaches", rows)
    same("causal_covers", rows)
    same("visible_key_end", itertools.product(range(-3, 8), range(-2, 9), range(8)))
    same("causal_key_begin", itertools.product(range(-3, 8), (0, 1, 2, 3, 9)))


def test_tile_classes_of_the_compact_form():
    ranges = ((0, 6), (1, 4), (3, 3), (0, 2), (2, 99))
    keys = [(j, j + n) for j in KEYS for n in (1, 2, 3)]
    same(
        "classify_tile",
        [
            (*p, *j, x, *r, w)
            for p in spans(POSITIONS)
            for j in keys
            for x in (-1, 0, 2, 5, 9)
            for r in ranges
            for w in WINDOWS
        ],
    )


def test_tile_classes_of_flags_and_segments():
    bits = list(itertools.product((0, 1), repeat=4))
    same(
        "classify_tile_flags",
        [(*p, j, j + 2, *b, w) for p in spans(POSITIONS) for j in KEYS for b in bits for w in WINDOWS],
    )
    same("classify_tile_segments", [(*q, *k) for q in spans((-1, 0, 2, 4)) for k in spans((-1, 0, 2, 4))])
    same("combine_classes", itertools.product(range(3), repeat=2))


def test_alibi_bias_to_the_bit():
    slopes = [*semantics.mpt_alibi_slopes(12).tolist(), 0.0, -0.3, 1e4, 1e30]
    rows = [(s, p, j) for s in slopes for p in (-5, 0, 7, 1000, 2**24) for j in (0, 3, 999, 2**24 - 1)]
    found = evaluate(mask.alibi_bias, rows, torch.float32, torch.float32)
    slope, p, j = torch.tensor(rows, dtype=torch.float32).T
    assert torch.equal(found, semantics.alibi_bias(slope, p, j))


def test_clamped_positions_answer_alike():
    """clamp_position keeps every answer of causal, and fits int32."""
    for seqlen_k, window in itertools.product((1, 5), (0, 1, 3)):
        positions = (-(2**31), -7, -1, 0, 3, 5, 8, 9, 2**31, 2**32)
        clamped = evaluate(mask.clamp_position, [(p, seqlen_k, window) for p in positions]).tolist()
        for p, q in zip(positions, clamped, strict=True):
            for j in range(seqlen_k):
                assert semantics.causal(p, j, window) == semantics.causal(q, j, window), (p, q, j, window)


def test_words_of_tiles():
    """Bit words list the chosen lanes from the lowest to the highest, the sign bit included."""
    words = [1, 2, 3, 1 << 40, (1 << 62) + 8, -(2**63), -1]
    lowest = evaluate(tiles.lowest, [(w,) for w in words]).tolist()
    assert lowest == [((w & -w) % 2**64).bit_length() - 1 for w in words]


def test_pruning_rule_equals_the_cpp_one():
    generator = torch.Generator().manual_seed(0)
    r = torch.rand(4000, 6, generator=generator, dtype=torch.float64)
    columns = [
        2.0 ** (2 - 14 * r[:, 0]) * (r[:, 0] < 0.9),
        10.0 ** (6 * r[:, 1] - 3) * (1 - 2 * (r[:, 5] > 0.5)),
        10.0 ** (6 * r[:, 2] - 3),
        10.0 ** (6 * r[:, 3] - 3),
        (r[:, 4] - 0.5) * 10.0 ** (4 * r[:, 5]),
        torch.full((4000,), 21.5),
    ]
    rows = torch.stack(columns, 1).float().tolist()
    rows += [(1.0, 1.0, 1.0, 1.0, bad, 20.0) for bad in (float("inf"), -float("inf"))]
    rows += [(-1.0, 1.0, 1.0, 1.0, 0.0, 20.0), (1.0, 1.0, 1.0, float("inf"), 0.0, 20.0)]
    found = evaluate(prune.prune_cutoff, rows, torch.float32, torch.float32)
    torch.testing.assert_close(found, torch.tensor([_C.prune_cutoff(*row) for row in rows]), rtol=3e-6, atol=0)
    sums = [(10.0**e,) for e in range(-44, 38)] + [(0.0,), (float("inf"),)]
    found = evaluate(prune.prune_norm, sums, torch.float32, torch.float32)
    torch.testing.assert_close(found, torch.tensor([_C.prune_norm(*row) for row in sums]), rtol=1e-6, atol=0)
    rows = [(*p, *j) for p in spans(POSITIONS) for j in spans(KEYS) if j[1] > j[0]]
    assert evaluate(prune.tile_distance, rows).tolist() == [_C.tile_distance(*row) for row in rows]


@triton.jit
def threshold_kernel(out_ptr, seqlen_k, FULL_PRECISION: tl.constexpr):
    tl.store(out_ptr, prune.prune_threshold(FULL_PRECISION, seqlen_k))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_pruning_threshold(dtype):
    for seqlen_k in (0, 1, 2, 1000, 2**30):
        out = torch.zeros(1)
        threshold_kernel[(1,)](out, seqlen_k, FULL_PRECISION=dtype == "float32")
        assert out.item() == pytest.approx(_C.prune_threshold(dtype, seqlen_k), rel=1e-6)
