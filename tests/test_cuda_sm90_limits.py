"""What Hopper's tensor maps and grids cannot hold: served another way, or refused before anything is launched."""

import dataclasses

import pytest
import torch
from emulator import Session, attention
from emulator.session import machine
from internvl_kernels import testing
from internvl_kernels.testing import Case

SMALL = Case(seqlen_q=96, seqlen_k=160, heads_q=2, heads_kv=1, head_dim=64, dtype="bfloat16")
HUGE = 1 << 41  # elements; no tensor map holds such a stride


def problems(inputs):
    """What is wrong with either direction, and how often tensors were copied first."""
    truth = testing.oracle(inputs, "both")
    bounds = testing.attention_bounds(inputs, truth)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, "both")  # noqa: E731
    found, copies = [], []
    for run in (
        lambda: attention.forward(inputs, device=attention.HOPPER),
        lambda: attention.backward(inputs, *attention.saved(inputs, truth), device=attention.HOPPER),
    ):
        got, session = run()
        found += testing.mismatches(got, {name: truth[name] for name in got}, bounds, eager)
        copies.append(session.kernels().get("pack_rows", {}).get("launches", 0))
    return found, copies


def test_rows_that_overlap_are_copied():
    """Sliding windows over one line of numbers: every key begins eight elements after the one before."""
    inputs = testing.build(dataclasses.replace(SMALL, heads_q=1))
    line = torch.randn(160 * 8 + 64).bfloat16()
    inputs.k = inputs.v = line.as_strided((1, 160, 1, 64), (line.numel(), 8, 64, 1))
    assert problems(inputs) == ([], [2, 2])


@pytest.mark.parametrize("names", ("kv", "q"))
def test_strides_of_dimensions_of_size_one_do_not_matter(names):
    inputs = testing.build(dataclasses.replace(SMALL, heads_q=1, heads_kv=1, seqlen_q=1 if names == "q" else 96))
    for name in names:
        tensor = getattr(inputs, name)
        strides = [
            HUGE + 3 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        setattr(inputs, name, tensor.as_strided(tensor.shape, strides))
    assert problems(inputs) == ([], [0, 0])


def test_heads_that_share_memory_are_not_copied_in_the_forward():
    inputs = testing.build(dataclasses.replace(SMALL, heads_kv=2, batch=2))
    inputs.k = inputs.k[:1, :, :1].expand(inputs.k.shape)
    assert problems(inputs) == ([], [0, 1])


@pytest.mark.parametrize(
    "sizes",
    (
        {"batch": 1 << 20, "heads": 1 << 10, "seqlen_q": 1 << 20, "seqlen_k": 1},
        {"batch": 1 << 20, "heads": 1 << 10, "seqlen_q": 100, "seqlen_k": 1 << 20},
    ),
)
def test_more_tiles_than_a_grid_holds_are_refused(sizes):
    """Before anything is launched: no memory stands behind these addresses."""
    session, device = Session(), vars(attention.HOPPER)
    heads, head_dim = sizes["heads"], 64
    call = {"batch": sizes["batch"], "heads_q": heads, "heads_kv": heads, "head_dim": head_dim, "dtype": "bfloat16"}
    call |= {"seqlen_q": sizes["seqlen_q"], "seqlen_k": sizes["seqlen_k"], "softmax_scale": 1.0}
    for name in ("q", "out", "grad_out", "dq", "k", "v", "dk", "dv"):
        seqlen = sizes["seqlen_q" if name in ("q", "out", "grad_out", "dq") else "seqlen_k"]
        call[name] = (256, seqlen * heads * head_dim, heads * head_dim, head_dim)
    assert "more tiles than a grid holds" in machine.prefix_attn_fwd(call, device, 256)
    assert "more tiles than a grid holds" in machine.prefix_attn_bwd(call, device, 256)
    assert session.kernels() == {}
