"""prefix_attn on the emulator: the kernels' host functions called as csrc/cuda/prefix_attn.cpp calls them."""

from __future__ import annotations

import dataclasses
import mmap
from dataclasses import dataclass

import torch
from internvl_kernels import testing
from internvl_kernels.testing import Case, Inputs
from torch import Tensor

from .session import Session, machine

MASKS = ("prefix_len", "key_range", "query_start", "key_flags", "segment_ids")


@dataclass(frozen=True)
class Device:
    """What the launches look at. The numbers of an A100, unless a test wants others."""

    multiprocessors: int = 108
    compute_capability: int = 80
    max_shared_bytes: int = 163 * 1024


HOPPER = Device(132, 90, 227 * 1024)


def arguments(session: Session, inputs: Inputs, prune: bool) -> dict:
    """Sizes and addresses of a call, without its results."""
    (batch, seqlen_q, heads_q, head_dim), (_, seqlen_k, heads_kv, _) = inputs.q.shape, inputs.k.shape
    call = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "heads_q": heads_q, "heads_kv": heads_kv}
    call |= {"head_dim": head_dim, "dtype": str(inputs.q.dtype).split(".")[1], "window": inputs.mask["window"]}
    call["softmax_scale"] = head_dim**-0.5 if inputs.softmax_scale is None else inputs.softmax_scale
    call["alibi_prune"] = prune and inputs.alibi_slopes is not None
    for name in ("q", "k", "v"):
        call[name] = view(session.input(name, getattr(inputs, name)), getattr(inputs, name))
    for name in MASKS:
        if inputs.mask[name] is not None:
            call[name] = session.input(name, inputs.mask[name].contiguous())
    if inputs.alibi_slopes is not None:
        call["alibi_slopes"] = session.input("alibi_slopes", inputs.alibi_slopes)
    return call


def view(address: int, tensor: Tensor) -> tuple[int, int, int, int]:
    """A View of csrc/common/params.h."""
    return (address, *tensor.stride()[:3])


def forward(
    inputs: Inputs, *, device: Device | None = None, prune: bool = True, **options
) -> tuple[testing.bounds.Results, Session]:
    """out and lse of one call, and the session, already checked. ``options`` go to ``Session``."""
    session = Session(**options)
    call, device = arguments(session, inputs, prune), vars(device or Device())
    out = session.output("out", *inputs.q.shape, dtype=inputs.q.dtype)
    lse = session.output("lse", inputs.q.shape[0], inputs.q.shape[2], inputs.q.shape[1])
    call |= {"out": view(out.data_ptr(), out), "lse": lse.data_ptr()}
    workspace = session.workspace("workspace", machine.prefix_attn_fwd_workspace_bytes(call, device))
    session.check(machine.prefix_attn_fwd(call, device, workspace.data_ptr() if workspace.numel() else 0))
    return {"out": out, "lse": lse}, session


def backward(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    *,
    gradients: str = "both",
    device: Device | None = None,
    prune: bool = True,
    **options,
) -> tuple[testing.bounds.Results, Session]:
    """The gradients of one call whose forward returned out and lse, and the session, already checked."""
    session = Session(**options)
    call, device = arguments(session, inputs, prune), vars(device or Device())
    grad_out = torch.zeros_like(inputs.grad_out) if gradients == "lse" else inputs.grad_out
    for name, tensor in (("out", out), ("grad_out", grad_out)):
        call[name] = view(session.input(name, tensor), tensor)
    call["lse"] = session.input("lse", lse)
    if gradients != "out":
        call["grad_lse"] = session.input("grad_lse", inputs.grad_lse.contiguous())
    results = {}
    for name, like in (("dq", inputs.q), ("dk", inputs.k), ("dv", inputs.v)):
        results[name] = session.output(name, *like.shape, dtype=like.dtype)
        call[name] = view(results[name].data_ptr(), results[name])
    if inputs.alibi_slopes is not None:
        results["dalibi_slopes"] = session.output("dalibi_slopes", inputs.q.shape[2])
        call["dalibi_slopes"] = results["dalibi_slopes"].data_ptr()
    workspace = session.workspace("workspace", machine.prefix_attn_bwd_workspace_bytes(call, device))
    session.check(machine.prefix_attn_bwd(call, device, workspace.data_ptr() if workspace.numel() else 0))
    return results, session


def spread(inputs: Inputs, dim: int) -> Inputs:
    """The same q, k, v and grad_out with more than 2^31 elements between their rows, or batch rows: offsets that no 32
    bits hold, in memory that is mapped lazily. Shapes of at most 2 there."""
    stride = 2**31 + 64
    base = torch.frombuffer(mmap.mmap(-1, 4 * stride), dtype=inputs.q.dtype)
    moved = {}
    for i, name in enumerate(("q", "k", "v", "grad_out")):
        tensor = getattr(inputs, name)
        strides = list(torch.empty(tensor.shape).stride())
        strides[dim] = stride
        moved[name] = base.as_strided(tensor.shape, strides, i * stride // 8 // 64 * 64)
        moved[name].copy_(tensor)
    return dataclasses.replace(inputs, **moved)


def saved(inputs: Inputs, truth: testing.bounds.Results) -> tuple[Tensor, Tensor]:
    """out and lse as a forward without errors of its own would leave them."""
    return truth["out"].to(inputs.q.dtype), truth["lse"].float()


def backward_problems(case: Case, inputs: Inputs | None = None, **options) -> list[str]:
    """What is wrong with the backward alone on a case: it is given the true out and lse."""
    inputs = inputs or testing.build(case)
    truth = testing.oracle(inputs, case.gradients)
    got, _ = backward(inputs, *saved(inputs, truth), gradients=case.gradients, **options)
    bounds = testing.attention_bounds(inputs, truth)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, case.gradients)  # noqa: E731
    return testing.mismatches(got, {name: truth[name] for name in got}, bounds, eager)


def problems(case: Case, **options) -> list[str]:
    """What is wrong with the forward on a case: the gate of ``internvl_kernels.testing``."""
    inputs = testing.build(case)
    got, _ = forward(inputs, **options)
    truth = testing.oracle(inputs, None)
    eager = lambda: testing.run(testing.gate.reference.prefix_attn, inputs, None)  # noqa: E731
    return testing.mismatches(got, truth, testing.attention_bounds(inputs, truth), eager)
