"""Boxes of tensor copies in the emulator, against the PTX documentation, and what no tensor map describes."""

import numpy as np
import pytest
import torch
from emulator import Session
from emulator.session import machine
from test_emulator_layouts import BASE, SPANS, swizzle

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
        ({"byte_strides": [0, 512, 512]}, "the byte stride of dimension 1 is 0; allowed: positive multiples of 16"),
        ({"byte_strides": [1 << 40, 512, 512]}, "the byte stride of dimension 1 is 1099511627776; allowed: positive"),
        ({"byte_strides": [64, 512, 512]}, "the byte stride of dimension 1 is 64: rows of 128 bytes overlap"),
        ({"sizes": [64, 4, (1 << 32) + 1, 1]}, "the size of dimension 2 is 4294967297; allowed: 1 to 2^32"),
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
