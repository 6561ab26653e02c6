"""Operands of wgmma in the emulator, against the PTX documentation's formulas."""

import numpy as np
import pytest
import torch
from emulator import Session
from emulator.session import machine

BASE = 1024  # the emulator's first address of shared memory
SPANS = (0, 32, 64, 128)
# Bits 62 and 63 of a matrix descriptor.
MODE = {0: 0, 128: 1, 64: 2, 32: 3}


# ---- matrix descriptors: table and figures of "Asynchronous Warpgroup Level Matrix Shared Memory Layout" ----


def descriptor(start, leading, stride, span):
    assert all(x % 16 == 0 and x < 2**18 for x in (start, leading, stride))
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODE[span] << 62


def swizzle(byte, span):
    """The 16-byte chunk index within a row of `span` bytes is XORed with the number of the 128-byte line."""
    if span == 0:
        return byte
    chunk, line = byte // 16 % (span // 16), byte // 128 % (span // 16)
    return byte - 16 * chunk + 16 * (chunk ^ line)


def place_k_major(rows, span, start):
    """Bytes of element (row, k) of [rows, 16], and the descriptor."""
    at = np.empty((rows, 16), dtype=np.int64)
    for row in range(rows):
        for k in range(16):
            if span == 0:  # core matrices of 8 rows of 16 bytes: those of k one after another, then the next rows
                at[row, k] = start + row // 8 * 256 + k // 8 * 128 + row % 8 * 16 + k % 8 * 2
            else:
                at[row, k] = swizzle(start + row // 8 * 8 * span + row % 8 * span + 2 * k, span)
    return at, descriptor(start, 128, 256 if span == 0 else 8 * span, span)


def place_mn_major(rows, span, start):
    """Likewise of an operand whose rows are contiguous; k in groups of eight."""
    at = np.empty((rows, 16), dtype=np.int64)
    width = span // 2 if span else 8
    panels = -(-rows // width)
    for row in range(rows):
        for k in range(16):
            if span == 0:  # core matrices of 8 k of 16 bytes: those of the same k one after another
                at[row, k] = start + k // 8 * 128 * panels + row // 8 * 128 + k % 8 * 16 + row % 8 * 2
            else:  # panels of the swizzle's width, each with all 16 k
                panel, column = divmod(row, width)
                at[row, k] = swizzle(start + panel * 16 * span + k * span + 2 * column, span)
    if span == 0:
        return at, descriptor(start, 128 * panels, 128, span)
    return at, descriptor(start, 16 * span, 8 * span, span)


def accumulator_index(n):
    """Row and column of d[thread, i], from the figure of the D fragment of wgmma."""
    thread, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + i % 4 // 2 * 8
    return row, i // 4 * 8 + thread % 4 * 2 + i % 2


def a_fragments(a):
    """The registers of A, from its figure: [128 threads, 8 elements]."""
    thread, i = np.meshgrid(np.arange(128), np.arange(8), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    return a[row, thread % 4 * 2 + i % 2 + i // 4 * 8]


def multiply(a, b, n, *, span=128, a_mn=False, b_mn=False, from_registers=False, before=None, skew=0, **options):
    """d [64, n] of one wgmma on [64, 16] and [n, 16], and the session."""
    session = Session(**options)
    group = 8 * max(span, 16)
    a_at, a_bits = (place_mn_major if a_mn else place_k_major)(64, span, BASE + group + skew)
    b_start = (int(a_at.max()) // group + 2) * group
    b_at, b_bits = (place_mn_major if b_mn else place_k_major)(n, span, b_start)
    size = -(-(int(b_at.max()) + 2 - BASE) // 16) * 16
    image = torch.full((size // 2,), -1, dtype=torch.int16)  # NaN wherever no element is
    image[torch.from_numpy((b_at - BASE) // 2)] = b.view(torch.int16)
    if not from_registers:
        image[torch.from_numpy((a_at - BASE) // 2)] = a.view(torch.int16)
    row, column = accumulator_index(n)
    d = (torch.full((64, n), torch.nan) if before is None else before)[row, column].contiguous()
    machine.add("d", d.data_ptr(), d.numel() * 4, True)
    registers = session.input("registers", torch.from_numpy(a_fragments(a.view(torch.int16).numpy())).contiguous())
    error = machine.run_wgmma(
        is_bf16=a.dtype == torch.bfloat16,
        n=n,
        a_mn=a_mn,
        b_mn=b_mn,
        accumulate=before is not None,
        a=a_bits,
        b=b_bits,
        image=session.input("image", image),
        image_bytes=size,
        a_registers=registers if from_registers else 0,
        d=d.data_ptr(),
    )
    assert error == ""
    result = torch.empty(64, n)
    result[row, column] = d
    return result, session


def small_integers(*shape, dtype=torch.bfloat16):
    return torch.randint(-8, 9, shape).to(dtype)  # products and sums are exact, whatever their order


@pytest.mark.parametrize("a_mn", [False, True])
@pytest.mark.parametrize("b_mn", [False, True])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("n", [8, 80, 128, 256])
def test_wgmma_layouts(n, span, b_mn, a_mn):
    a, b = small_integers(64, 16), small_integers(n, 16)
    result, session = multiply(a, b, n, span=span, a_mn=a_mn, b_mn=b_mn)
    session.check()
    assert torch.equal(result, a.float() @ b.float().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b_mn", [False, True])
def test_wgmma_with_a_from_registers_adds_to_what_is_there(b_mn, dtype):
    a, b = small_integers(64, 16, dtype=dtype), small_integers(80, 16, dtype=dtype)
    before = torch.randint(-99, 100, (64, 80)).float()
    result, session = multiply(a, b, 80, b_mn=b_mn, from_registers=True, before=before)
    session.check()
    assert torch.equal(result, a.float() @ b.float().T + before)


@pytest.mark.parametrize("span, skew", [(128, 32), (128, 96), (64, 32)])
def test_a_slice_of_k_begins_inside_of_the_swizzled_row(span, skew):
    a, b = small_integers(64, 16), small_integers(8, 16)
    result, session = multiply(a, b, 8, span=span, skew=skew)
    session.check()
    assert torch.equal(result, a.float() @ b.float().T)


def test_wgmma_rounding():
    a, b, before = torch.randn(64, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.randn(64, 8)
    truth = a.double() @ b.double().T + before.double()
    limit = 16 * 2**-24 * (a.double().abs() @ b.double().abs().T + before.double().abs())
    results = [multiply(a, b, 8, before=before, sum_order=order)[0] for order in range(4)]
    assert all(((result - truth).abs() <= limit).all() for result in results)
    assert len({tuple(result.flatten().tolist()) for result in results}) > 1
    a, b, before = a.abs(), b.abs(), before.abs()
    below = multiply(a, b, 8, before=before, toward_zero=True)[0]
    assert (below <= a.double() @ b.double().T + before.double()).all()


@pytest.mark.parametrize("columns, width", [(128, 64), (96, 32), (48, 16)])
def test_panel_tiles_are_what_tensor_copies_write_and_wgmma_reads(columns, width):
    rows, span = 64, 2 * width
    size, offsets, k_major, mn_major = machine.panel_tile(columns)
    assert size == rows * columns * 2
    panel = rows * span
    expected = [
        column // width * panel + swizzle(row * span + column % width * 2, span)
        for row in range(rows)
        for column in range(columns)
    ]
    assert offsets == expected
    start = [
        k // width * panel + row * span + k % width * 2 for k in range(0, columns, 16) for row in range(0, rows, 8)
    ]
    assert k_major == [descriptor(BASE + at, 16, 8 * span, span) for at in start]
    start = [column // width * panel + k * span for k in range(0, rows, 16) for column in range(0, columns, width)]
    assert mn_major == [descriptor(BASE + at, panel, 8 * span, span) for at in start]
