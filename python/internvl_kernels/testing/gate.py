"""Runs a case on a backend and says what is wrong with the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import backends, reference, registration, variables
from .bounds import Results, attention_bounds
from .cases import Case, Inputs, build

GRADIENT_NAMES = ("dq", "dk", "dv", "dalibi_slopes")
HEADS_DIM = {"out": 2, "lse": 1, "dq": 2, "dk": 2, "dv": 2, "dalibi_slopes": 0}
EAGER_FACTOR = 2.0
FEW_VALUES = 8  # of a head, eager attention may be lucky in all of them
DENSE_LIMIT = 1 << 24  # scores per comparison; the oracle and the bounds hold about ten such tensors of 8 bytes each


def device_of(backend: str) -> str:
    """Where the tensors of a backend live; Triton's interpreter takes them on the CPU."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not variables.triton_interpret()) else "cpu"


def run(operator: Callable, inputs: Inputs, gradients: str | None = "both") -> Results:
    """out, lse and the gradients through "both", "out" or "lse" (None: no gradients) of one operator, on the CPU."""
    track = gradients is not None
    q, k, v = (t.detach().requires_grad_(track) for t in (inputs.q, inputs.k, inputs.v))
    slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes.detach().requires_grad_(track)
    with torch.set_grad_enabled(track):
        out, lse = operator(q, k, v, alibi_slopes=slopes, softmax_scale=inputs.softmax_scale, **inputs.mask)
    results = {"out": out.detach(), "lse": lse.detach()}
    if track:
        pairs = {"out": (out, inputs.grad_out), "lse": (lse, inputs.grad_lse.to(lse.dtype))}
        outputs, cotangents = zip(*(pairs[n] for n in (pairs if gradients == "both" else [gradients])), strict=True)
        leaves = [q, k, v] if slopes is None else [q, k, v, slopes]
        grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
        results |= zip(GRADIENT_NAMES, grads, strict=False)
    return {name: result.cpu() for name, result in results.items()}


def oracle(inputs: Inputs, gradients: str | None = "both") -> Results:
    """What the results should be: the reference in float64."""
    return run(reference.prefix_attn, inputs.to(torch.float64), gradients)


def mismatches(got: Results, truth: Results, bounds: Results, eager: Callable[[], Results] | None = None) -> list[str]:
    """One sentence per result that breaks the rule; ``eager`` is run only when a bound alone is exceeded.

    NaN and infinities must stand at the same places with the same sign; the rule holds for the rest.
    """
    problems, eager_results = [], None
    for name, right in truth.items():
        found, right = got[name].double(), right.double()
        if found.shape != right.shape:
            problems.append(f"{name}: shape {list(found.shape)}, expected {list(right.shape)}")
            continue
        odd = ~right.isfinite() | ~found.isfinite()
        wrong = odd & ~((found == right) | (found.isnan() & right.isnan()))
        if wrong.any():
            problems.append(f"{name}: {_first(wrong, found, right)} and {int(wrong.sum()) - 1} more not finite alike")
        error = (found - right).abs().masked_fill(odd, 0)
        over = error > bounds[name]
        if over.any() and eager is not None:
            eager_results = eager_results or eager()
            loss = (eager_results[name].double() - right).abs().masked_fill(odd, 0).nan_to_num(posinf=0)
            over = error > bounds[name] + EAGER_FACTOR * _per_head(name, loss)
        if over.any():
            worst = (error / bounds[name]).masked_fill(~over, 0).max()
            problems.append(
                f"{name}: {int(over.sum())} of {over.numel()} off, up to {worst:.3g} x the bound; "
                f"{_first(over, found, right)}"
            )
    return problems


def _per_head(name: str, loss: Tensor) -> Tensor:
    """The largest loss of each (batch row, head), broadcastable; of all heads where one has too few values to tell."""
    if loss.numel() == 0 or name == "dalibi_slopes":
        return loss
    if name == "lse":
        return loss.amax(2, keepdim=True)
    few = loss.shape[1] * loss.shape[3] < FEW_VALUES
    return loss.amax((1, 2, 3) if few else (1, 3), keepdim=True)


def _first(where: Tensor, found: Tensor, right: Tensor) -> str:
    place = tuple(where.nonzero()[0].tolist())
    return f"{list(place)} is {found[place]:.9g}, expected {right[place]:.9g}"


def _head_parts(inputs: Inputs, results: Results) -> Iterator[tuple[Inputs, Results]]:
    """The call cut by KV heads when its dense scores would fill the memory; in one piece otherwise."""
    (batch, seqlen_q, heads_q, _), (_, seqlen_k, heads_kv, _) = inputs.q.shape, inputs.k.shape
    if batch * heads_q * seqlen_q * seqlen_k <= DENSE_LIMIT:
        yield inputs, results
        return
    group = heads_q // heads_kv
    for head in range(heads_kv):
        own, own_kv = slice(head * group, (head + 1) * group), slice(head, head + 1)
        part = dataclasses.replace(
            inputs,
            q=inputs.q[:, :, own],
            k=inputs.k[:, :, own_kv],
            v=inputs.v[:, :, own_kv],
            alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[own],
            grad_out=inputs.grad_out[:, :, own],
            grad_lse=inputs.grad_lse[:, own],
        )
        spans = {name: own_kv if name in ("dk", "dv") else own for name in results}
        yield part, {n: t[(slice(None),) * HEADS_DIM[n] + (spans[n],)] for n, t in results.items()}


def correctness_gate(backend: str, case: Case, *, gradients: bool = True, eager: bool | None = None) -> list[str]:
    """What is wrong with ``backend`` on ``case``, one sentence each; empty when it passes.

    Args:
        backend: a name of ``backends.BACKENDS`` that runs here.
        case: shapes of any size; large ones are compared one KV head at a time.
        gradients: False looks at out and lse only.
        eager: grant twice the error of eager attention on top of the bounds. Default: to every backend but ``cpu``,
            whose kernels keep everything in fp32 up to the last rounding; to those only where they multiply bf16
            numbers (``INTERNVL_CPU_ISA`` avx512_bf16), for which P and dS are rounded.
    """
    inputs = build(case)
    device, through = device_of(backend), case.gradients if gradients else None
    operator = backends.select("prefix_attn", inputs.q.to(device), backend)
    got = run(operator, inputs.to(device=device) if device != "cpu" else inputs, through)
    granted = eager
    if granted is None:
        granted = backend != "cpu" or (case.dtype == "bfloat16" and registration.cpu_info()["isa"] == "avx512_bf16")
    problems = []
    for part, results in _head_parts(inputs, got):
        truth = oracle(part, through)
        loss = (lambda part=part: run(reference.prefix_attn, part, through)) if granted else None
        problems += mismatches(results, truth, attention_bounds(part, truth), loss)
    return problems
