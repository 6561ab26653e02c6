"""The operators on the emulated CUDA kernels, with the signatures of ``internvl_kernels.reference``."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from .session import Session, machine

# Few multiprocessors: schedules that depend on their number split and queue work on small shapes too.
DEVICE = {"multiprocessors": 4, "compute_capability": 80, "max_shared_bytes": 163 * 1024}

_options: dict = {}
_collected: list[_Run] = []


@contextlib.contextmanager
def options(**changes):
    """Run the operators with other options of ``Session`` (seed, skip, ...) or ``device=``, ``check=False``,
    ``prune=False``; yields the list of runs, which fills up."""
    global _options, _collected
    before = _options, _collected
    _options, _collected = _options | changes, []
    try:
        yield _collected
    finally:
        _options, _collected = before


class _Run(Session):
    """One launch: collects arguments, runs, checks."""

    def __init__(self):
        own = {k: v for k, v in _options.items() if k not in ("device", "check", "prune")}
        super().__init__(**own)
        self.device = DEVICE | _options.get("device", {})
        self.arguments: dict = {}

    def set(self, **values) -> None:
        self.arguments |= values

    def tensors(self, **tensors: Tensor | None) -> None:
        contiguous = {name: t if t is None else t.contiguous() for name, t in tensors.items()}  # as check.cpp does
        self.set(**{name: self.input(name, tensor) or None for name, tensor in contiguous.items()})

    def views(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.set(**{name: (self.input(name, tensor), *tensor.stride()[:3])})

    def output_view(self, name: str, like: Tensor) -> Tensor:
        tensor = self.output(name, *like.shape, dtype=like.dtype)
        self.set(**{name: (tensor.data_ptr(), *tensor.stride()[:3])})
        return tensor

    def output_floats(self, name: str, *shape: int) -> Tensor:
        tensor = self.output(name, *shape)
        self.set(**{name: tensor.data_ptr()})
        return tensor

    def launch(self, function: str) -> None:
        size = getattr(machine, f"{function}_workspace_bytes")(self.arguments, self.device)
        workspace = self.workspace("workspace", size)
        error = getattr(machine, function)(self.arguments, self.device, workspace.data_ptr())
        self.finish(error)

    def finish(self, error: str) -> None:
        """Keeps what was reported and counted, which the next session forgets; raises when it was bad."""
        self.seen = self.reports() + ([("refused", error, 1)] if error else [])
        self.counted = self.kernels()
        _collected.append(self)
        if _options.get("check", True):
            self.check(error)


def _common(run: _Run, q, k, v, mask, slopes, scale) -> None:
    run.set(dtype=str(q.dtype).removeprefix("torch."), batch=q.shape[0], seqlen_q=q.shape[1], seqlen_k=k.shape[1])
    run.set(heads_q=q.shape[2], heads_kv=k.shape[2], head_dim=q.shape[3], window=mask["window"])
    run.set(softmax_scale=1 / math.sqrt(q.shape[3]) if scale is None else scale)
    run.set(alibi_prune=int(slopes is not None and _options.get("prune", True)))
    run.views(q=q, k=k, v=v)
    names = ("prefix_len", "key_range", "query_start", "key_flags", "segment_ids")
    run.tensors(alibi_slopes=slopes, **{name: mask[name] for name in names})


class _PrefixAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slopes, scale, mask):
        run = _Run()
        _common(run, q, k, v, mask, slopes, scale)
        out = run.output_view("out", q)
        lse = run.output_floats("lse", q.shape[0], q.shape[2], q.shape[1])
        run.launch("prefix_attn_fwd")
        ctx.save_for_backward(q, k, v, slopes, out, lse)
        ctx.scale, ctx.mask = scale, mask
        return out.clone(), lse.clone()

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, slopes, out, lse = ctx.saved_tensors
        run = _Run()
        _common(run, q, k, v, ctx.mask, slopes, ctx.scale)
        run.views(out=out, grad_out=grad_out)
        run.tensors(lse=lse, grad_lse=grad_lse)
        grads = [run.output_view(name, like) for name, like in (("dq", q), ("dk", k), ("dv", v))]
        dslopes = None if slopes is None else run.output_floats("dalibi_slopes", q.shape[2])
        run.launch("prefix_attn_bwd")
        return (*grads, dslopes, None, None)


def prefix_attn(
    q,
    k,
    v,
    *,
    prefix_len=None,
    key_range=None,
    query_start=None,
    key_flags=None,
    segment_ids=None,
    alibi_slopes=None,
    softmax_scale=None,
    window=0,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as ``reference.prefix_attn``, forward and backward."""
    mask = {
        "prefix_len": prefix_len,
        "key_range": key_range,
        "query_start": query_start,
        "key_flags": key_flags,
        "segment_ids": segment_ids,
        "window": window,
    }
    return _PrefixAttn.apply(q, k, v, alibi_slopes, softmax_scale, mask)
