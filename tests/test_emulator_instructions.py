"""Instructions of the emulator against the PTX documentation: fragments, rounding, arithmetic, widths of accesses."""

import pytest
import torch
from emulator import Session
from emulator.session import machine

LANE = torch.arange(32)
GROUP, IN_GROUP = LANE // 4, LANE % 4

# ---- fragments, from the tables of the PTX documentation: element i of a lane's registers ----


def a_index(i):
    row = GROUP if i in (0, 1, 4, 5) else GROUP + 8
    return row, IN_GROUP * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_index(i):
    return IN_GROUP * 2 + (i & 1) + (8 if i >= 2 else 0), GROUP


def c_index(i):
    return (GROUP if i < 2 else GROUP + 8), IN_GROUP * 2 + (i & 1)


def fragments(matrix, index, count):
    return torch.stack([matrix[index(i)] for i in range(count)], 1).contiguous()


def run_mma(a, b, c, **options):
    session = Session(**options)
    ptr_a = session.input("a", fragments(a, a_index, 8))
    ptr_b = session.input("b", fragments(b, b_index, 4))
    ptr_c = session.input("c", fragments(c, c_index, 4))
    d = session.output("d", 32, 4)
    session.check(machine.run_mma(a.dtype == torch.bfloat16, ptr_a, ptr_b, ptr_c, d.data_ptr()))
    result = torch.empty(16, 8)
    for i in range(4):
        result[c_index(i)] = d[:, i]
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_layout(dtype):
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)
    c = torch.randint(-99, 100, (16, 8)).float()
    assert torch.equal(run_mma(a, b, c), a.float() @ b.float() + c)  # small integers: exact in any order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_rounding(dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    truth = a.double() @ b.double() + c.double()
    limit = 16 * 2**-24 * (a.double().abs() @ b.double().abs() + c.double().abs())
    results = [run_mma(a, b, c, sum_order=order) for order in range(4)]
    assert all(((r - truth).abs() <= limit).all() for r in results)
    assert len({tuple(r.flatten().tolist()) for r in results}) > 1  # the order of the sums is a choice
    a, b, c = a.abs(), b.abs(), c.abs()
    assert (run_mma(a, b, c, toward_zero=True) <= a.double() @ b.double() + c.double()).all()


def test_mma_subnormal_and_special_numbers():
    a, b = torch.zeros(16, 16, dtype=torch.float16), torch.zeros(16, 8, dtype=torch.float16)
    a[0, 3], a[1, 4], a[2, 5] = 2.0**-24, torch.inf, torch.nan
    b[3:6] = 1.0
    d = run_mma(a, b, torch.zeros(16, 8))
    assert (d[0] == 2.0**-24).all() and (d[1] == torch.inf).all() and d[2].isnan().all() and not d[3:].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix_layout(matrices, transposed):
    image = torch.randint(-(2**15), 2**15, (64, 8), dtype=torch.int16)  # rows of 16 bytes
    rows = torch.randperm(64)[:32]
    session = Session()
    out = session.workspace("out", 512).view(torch.int16).view(32, 4, 2)
    pointers = session.input("image", image), session.input("rows", (16 * rows).int())
    session.check(machine.run_ldmatrix(pointers[0], 1024, pointers[1], out.data_ptr(), matrices, transposed))
    for m in range(matrices):
        matrix = image[rows[8 * m : 8 * m + 8]]
        matrix = matrix.T if transposed else matrix
        for half in (0, 1):
            assert torch.equal(out[:, m, half], matrix[LANE // 4, 2 * (LANE % 4) + half])


def test_shuffles_and_votes():
    values = torch.randint(0, 50, (64,), dtype=torch.int32)
    session = Session()
    out = session.output("out", 64, 6, dtype=torch.int32)
    session.check(machine.run_exchange(session.input("in", values), out.data_ptr()))
    for warp in (slice(0, 32), slice(32, 64)):
        own = values[warp]
        assert torch.equal(out[warp, 0], own[LANE ^ 5])
        assert torch.equal(out[warp, 1], own[own.long() % 32])
        assert (out[warp, 2] == int((own == 3).any())).all() and (out[warp, 3] == int((own < 40).all())).all()
    assert (out[:, 4] == int((values == 3).any())).all() and (out[:, 5] == int((values < 40).all())).all()


# ---- arithmetic ----


def run_math(function, x):
    session = Session()
    y = session.output("y", x.numel())
    session.check(machine.run_math(session.input("x", x), y.data_ptr(), x.numel(), function))
    return y


@pytest.mark.parametrize("function, dtype", [(5, torch.bfloat16), (6, torch.float16)])
def test_conversions_round_to_nearest_even(function, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halfway = (every[:-1] + every[1:]) / 2
    x = torch.cat([every, halfway, torch.randn(20000) * 2.0 ** torch.randint(-30, 18, (20000,))])
    y = run_math(function, x)
    assert torch.equal(y.nan_to_num(nan=1e30), x.to(dtype).float().nan_to_num(nan=1e30))


MATH = {
    0: (torch.exp2, lambda x: 2.0**-22 * torch.exp2(x), (-120, 120)),
    1: (torch.log2, lambda x: 2.0**-22 * torch.log2(x).abs().clamp_min(1), (0, 100)),
    2: (torch.reciprocal, lambda x: 2.0**-22 / x, (0, 100)),
    3: (torch.rsqrt, lambda x: 2.0**-22.9 / x.sqrt(), (0, 100)),
}


@pytest.mark.parametrize("function", MATH)
def test_special_functions_are_as_good_as_documented_and_no_better(function):
    exact, limit, (low, high) = MATH[function]
    x = torch.rand(4096) * (high - low) + low
    y = run_math(function, x).double()
    assert ((y - exact(x.double())).abs() <= limit(x.double())).all()
    assert (y != exact(x.double()).float()).float().mean() > 0.3
    exact_powers = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
    if function in (1, 2):
        assert torch.equal(run_math(function, exact_powers), exact(exact_powers))


def test_special_functions_at_the_edges():
    inf = torch.inf
    ex2, lg2, rcp = (run_math(f, torch.tensor([-inf, inf, 0.0, 2.0**-127, -200.0, 7.0])).tolist() for f in (0, 1, 2))
    assert ex2 == [0, inf, 1, 1, 0, 128]
    assert lg2[1:4] == [inf, -inf, -inf] and lg2[0] != lg2[0]
    assert rcp[:5] == [0, 0, inf, inf, pytest.approx(-0.005)]


def test_fma_rounds_once():
    x = torch.randn(4096) * 2.0 ** torch.randint(-8, 8, (4096,))
    wide = x.double() * x.double() + x.double().flip(0)
    assert (run_math(4, x) == wide.float()).float().mean() > 0.999
    tricky = torch.tensor([1 + 2.0**-12, 2.0**-60])  # the double sum is a tie that one rounding does not see
    assert run_math(4, tricky)[0] == torch.tensor(1 + 2.0**-11 + 2.0**-23)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_loads_and_stores_of_every_width(width):
    data = torch.randint(0, 256, (64 * width,), dtype=torch.uint8)
    session = Session()
    out = session.output("out", 64 * width, dtype=torch.uint8)
    session.check(machine.run_copy(width, session.input("in", data), out.data_ptr()))
    assert torch.equal(out, data)
