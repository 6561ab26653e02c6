"""Operands of wgmma and boxes of tensor copies in the emulator, against the PTX documentation's formulas."""

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


# ---- tensor copies ----

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def copy_box(session, tensor, box, at, span, *, image=None, store=0):
    """The image of shared memory that a load leaves (uint8), or the error of the launch."""
    size = int(np.prod(box)) * tensor.element_size()
    loaded = session.workspace("image", size)
    item = tensor.element_size()
    error = machine.run_copy_box(
        type=TYPES.index(tensor.dtype),
        sizes=list(reversed(tensor.shape)),
        byte_strides=[item * s for s in reversed(tensor.stride()[:-1])],
        box=list(box),
        at=list(at),
        swizzle=span,
        store=store,
        base=tensor.data_ptr(),
        image=session.input("source", image) if store else loaded.data_ptr(),
        image_bytes=size,
    )
    return error or loaded


def box_of(tensor, box, at):
    """The box's elements, innermost dimension last; zero where the tensor ends."""
    shape, begin = list(reversed(box)), list(reversed(at))
    result = torch.zeros(shape, dtype=tensor.dtype)
    inside, outside = [], []
    for length, first, size in zip(shape, begin, tensor.shape, strict=True):
        low, high = max(0, first), min(size, first + length)
        inside.append(slice(low, max(low, high)))
        outside.append(slice(low - first, max(low, high) - first))
    result[tuple(outside)] = tensor[tuple(inside)]
    return result


def as_image(elements, span):
    """Bytes of shared memory from 2048 on: the box's elements in order, their chunks swizzled by address."""
    flat = elements.contiguous().view(torch.uint8).flatten()
    place = [swizzle(2 * BASE + byte, span) - 2 * BASE for byte in range(0, flat.numel(), 16)]
    image = torch.empty_like(flat).view(-1, 16)
    image[torch.tensor(place) // 16] = flat.view(-1, 16)
    return image.flatten()


BOXES = {
    "inside": ((3, 2, 20), (1, 1, 5)),
    "beyond the end": ((3, 2, 20), (3, 2, 24)),
    "before the begin": ((2, 1, 20), (-1, 0, -3)),
    "outside": ((1, 1, 4), (0, 7, 0)),
}


@pytest.mark.parametrize("where", list(BOXES))
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("dtype", TYPES)
def test_tensor_copies(dtype, span, where):
    width = (span or 48) // dtype.itemsize
    whole = torch.randn(5, 3, 40, 80).to(dtype)
    tensor = whole.transpose(0, 1)[..., :70]  # strides in no order, rows longer than the tensor
    (rest, middle, rows), (c3, c2, c1) = BOXES[where]
    box, at = (width, rows, middle, rest), (64 if "end" in where else -8 if "begin" in where else 16, c1, c2, c3)
    session = Session()
    session.input("tensor", tensor)
    loaded = copy_box(session, tensor, box, at, span)
    session.check()
    assert torch.equal(loaded, as_image(box_of(tensor, box, at), span))
    # And back: only what lies inside of the tensor is written.
    target = torch.zeros_like(whole)
    view = target.transpose(0, 1)[..., :70]
    session = Session()
    machine.add("target", target.data_ptr(), target.numel() * target.element_size(), True)
    new = torch.randn(tuple(reversed(box))).to(dtype)
    assert isinstance(copy_box(session, view, box, at, span, image=as_image(new, span), store=1), torch.Tensor)
    session.check()
    marked = torch.zeros_like(whole)
    low = [max(0, first) for first in reversed(at)]
    part = tuple(
        slice(first, max(first, min(size, start + length)))
        for first, size, start, length in zip(low, view.shape, reversed(at), reversed(box), strict=True)
    )
    moved = tuple(slice(s.start - start, s.stop - start) for s, start in zip(part, reversed(at), strict=True))
    marked.transpose(0, 1)[..., :70][part] = new[moved]
    assert torch.equal(target, marked)


def test_tensor_copies_in_five_dimensions_and_additions():
    tensor = torch.randn(2, 3, 7, 4, 64).bfloat16()
    session = Session()
    session.input("tensor", tensor)
    box, at = (64, 4, 5, 1, 1), (0, 0, 4, 2, 1)
    loaded = copy_box(session, tensor, box, at, 128)
    session.check()
    assert torch.equal(loaded, as_image(box_of(tensor, box, at), 128))
    total, more = torch.randn(1, 2, 6, 8), torch.randn(1, 1, 4, 8)
    session, expected = Session(), total.clone()
    expected[:, 1:, 2:] += more
    machine.add("total", total.data_ptr(), total.numel() * 4, True)
    copy_box(session, total, (8, 4, 1, 1), (0, 2, 1, 0), 32, image=as_image(more, 32), store=2)
    session.check()
    assert torch.equal(total, expected)


def test_copies_of_rows():
    session = Session()
    data, out = torch.randn(64), session.output("out", 64)
    assert machine.run_copy_row(session.input("in", data), out.data_ptr()) == ""
    session.check()
    assert torch.equal(data, out)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base": 8}, "address that is not a multiple of 16"),
        ({"sizes": [64, 0, 1, 1]}, "the size of dimension 1 is 0"),
        ({"box": [64, 300, 1, 1]}, "the box of dimension 1 is 300; allowed: 1 to 256"),
        ({"byte_strides": [136, 512, 512]}, "the byte stride of dimension 1 is 136; allowed: positive multiples of 16"),
        ({"box": [32, 4, 1, 1]}, "a row of the box has 64 bytes; allowed: the 128 that the swizzle spans"),
        ({"box": [20, 4, 1, 1], "swizzle": 0}, "a row of the box has 40 bytes; allowed: multiples of 16"),
        ({"sizes": [64, 4]}, "the rank is 2; allowed: 3 to 5"),
    ],
)
def test_what_no_tensor_map_describes_is_refused_in_words(change, message):
    session = Session()
    form = {
        "type": 0,
        "sizes": [64, 4, 1, 1],
        "byte_strides": [128, 512, 512],
        "box": [64, 4, 1, 1],
        "at": [0, 0, 0, 0],
        "swizzle": 128,
        "store": 0,
        "base": 0,
        "image": session.workspace("image", 512).data_ptr(),
        "image_bytes": 512,
    }
    assert message in machine.run_copy_box(**(form | change))
    assert session.kernels() == {}
