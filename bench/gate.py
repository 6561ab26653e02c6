"""No timing of a wrong result: every measured call is compared with float64 first.

Two looks: the same masks, heads and dtype at a length where everything fits (forward and gradients, whole), and random
rows of the very tensors that will be timed (forward). The bounds are the tests' bounds.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from internvl_kernels import backends, clip_qk_layernorm, reference
from internvl_kernels.testing import (
    Inputs,
    attention_bounds,
    build,
    correctness_gate,
    layernorm_bounds,
    mismatches,
    oracle,
    run,
)

from .cases import BenchCase, NormCase

GATE_LENGTH = 320  # several tiles of every backend
SAMPLED_ROWS, SAMPLED_HEADS = 12, 2
POISON_LIMIT = 1 << 27  # elements of the dense mask
NORM_ROWS, NORM_EPS = 96, 1e-5


class WrongResult(AssertionError):
    """A backend failed the gate; nothing may be timed."""


def check(case: BenchCase, backend: str, inputs: Inputs, out: torch.Tensor, *, gradients: bool) -> None:
    """Raises WrongResult with every complaint, the backend and the case."""
    problems = correctness_gate(backend, shortened(case).case, gradients=gradients)
    problems += [f"sampled rows: {text}" for text in sampled_rows(inputs, out, backend)]
    if problems:
        raise WrongResult("\n".join([f"{backend} is wrong on {case.name}: {case.case!r}", *problems]))


def shortened(case: BenchCase) -> BenchCase:
    """The same call with at most GATE_LENGTH keys and a few heads: masks shrink in proportion."""
    c = case.case
    ratio = min(1.0, GATE_LENGTH / c.seqlen_k)

    def shrink(n: int) -> int:
        return round(n * ratio)

    group = c.heads_q // c.heads_kv
    heads_kv = min(c.heads_kv, 2)
    small = dataclasses.replace(
        c,
        batch=min(c.batch, 2),
        seqlen_q=max(1, shrink(c.seqlen_q)),
        seqlen_k=max(1, shrink(c.seqlen_k)),
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        prefix_len=c.prefix_len and tuple(shrink(n) for n in c.prefix_len[:2]),
        key_range=c.key_range and tuple((shrink(a), shrink(b)) for a, b in c.key_range[:2]),
    )
    return BenchCase(f"{case.name} (shortened)", small)


def sampled_rows(inputs: Inputs, out: torch.Tensor, backend: str) -> list[str]:
    """What is wrong in random query rows (the first and the last among them) of a few heads of batch row 0."""
    seqlen_q, heads = inputs.q.shape[1:3]
    group = heads // inputs.k.shape[2]
    generator = torch.Generator().manual_seed(0)
    rows = {0, seqlen_q - 1, *torch.randint(0, seqlen_q, (SAMPLED_ROWS,), generator=generator).tolist()}
    problems = []
    for head in sorted({0, *torch.randint(0, heads, (SAMPLED_HEADS - 1,), generator=generator).tolist()}):
        for row in sorted(rows):
            part = _one_row(inputs, row, head, group)
            truth = oracle(part, None)
            got = {"out": out[:1, row : row + 1, head : head + 1].detach().cpu()}
            bounds = attention_bounds(part, truth)
            eager = None if backend == "cpu" else lambda part=part: run(reference.prefix_attn, part, None)
            found = mismatches(got, {"out": truth["out"]}, bounds, eager)
            problems += [f"row {row}, head {head}: {text}" for text in found]
    return problems


def _one_row(inputs: Inputs, row: int, head: int, group: int) -> Inputs:
    """Batch row 0, one query row, one head, all keys; on the CPU."""
    mask = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.mask.items()}
    start = mask["query_start"]
    first = inputs.k.shape[1] - inputs.q.shape[1] if start is None else int(start[0])
    mask["query_start"] = torch.tensor([first + row], dtype=torch.int32)
    own, own_kv = slice(head, head + 1), slice(head // group, head // group + 1)
    part = dataclasses.replace(
        inputs,
        q=inputs.q[:1, row : row + 1, own],
        k=inputs.k[:1, :, own_kv],
        v=inputs.v[:1, :, own_kv],
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[own],
        mask=mask,
        grad_out=inputs.grad_out[:1, row : row + 1, own],
        grad_lse=inputs.grad_lse[:1, own, row : row + 1],
    )
    return part.to(device="cpu")


@functools.lru_cache(maxsize=1)  # one backend after another measures a case; random numbers in the billions take long
def inputs_for(case: BenchCase, device: str = "cpu") -> tuple[Inputs, Inputs]:
    """Ours (NaN where nothing may be read) and the peers' (the same with zeros there), on ``device``."""
    c = case.case
    own = build(c, poison=c.batch * c.seqlen_q * c.seqlen_k <= POISON_LIMIT)
    own = own.to(device=device) if device != "cpu" else own
    clean = dataclasses.replace(own, q=own.q.nan_to_num(0), k=own.k.nan_to_num(0), v=own.v.nan_to_num(0))
    return own, clean


def operator(backend: str, inputs: Inputs):
    """``prefix_attn`` of ``backend`` as ``forward(q, k, v) -> out`` on these masks."""
    run_op = backends.select("prefix_attn", inputs.q, backend)
    return lambda q, k, v: run_op(
        q, k, v, alibi_slopes=inputs.alibi_slopes, softmax_scale=inputs.softmax_scale, **inputs.mask
    )[0]


def check_norm(case: NormCase, backend: str, leaves: list[torch.Tensor], clip: float, *, gradients: bool) -> None:
    """Raises WrongResult when the first rows, and their gradients if wanted, are not within the tests' bounds."""
    qkv, *parameters = (t.detach() for t in leaves)
    rows = qkv[:NORM_ROWS]
    widths = {"q": case.q_width, "k": case.k_width, "v": case.k_width}
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(len(rows), width, generator=generator).to(rows.dtype) for width in widths.values()]

    def results(forward, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        tracked = [t.clone().requires_grad_(gradients) for t in tensors]
        out = forward(tracked[0], case.q_width, case.k_width, clip, *tracked[1:])
        found = dict(zip(widths, out, strict=False))
        if gradients:
            given = [grad.to(t) for grad, t in zip(grads, found.values(), strict=True)]
            names = ("dx", "dweight q", "dbias q", "dweight k", "dbias k")
            found |= zip(names, torch.autograd.grad(list(found.values()), tracked, given), strict=True)
        return {name: t.detach().double().cpu() for name, t in found.items()}

    got = results(functools.partial(clip_qk_layernorm, backend=backend), rows, *parameters)
    truth = results(reference.clip_qk_layernorm, *(t.double().cpu() for t in (rows, *parameters)))
    x = rows.clamp(-clip, clip).cpu()
    problems = [] if torch.equal(got["v"], truth["v"]) else ["v is not the clipped input"]
    for i, part in enumerate("qk"):
        columns = slice(i * case.q_width, case.q_width + i * case.k_width)
        weight, bias = (t.cpu() for t in parameters[2 * i : 2 * i + 2])
        bounds = layernorm_bounds(x[:, columns], weight, bias, NORM_EPS, grads[i])
        places = {"y": (part, ...)}
        if gradients:
            places |= {
                "dx": ("dx", (..., columns)),
                "dweight": (f"dweight {part}", ...),
                "dbias": (f"dbias {part}", ...),
            }
        for what, (name, place) in places.items():
            worst = ((got[name][place] - truth[name][place]).abs() / bounds[what]).max()
            if not worst <= 1:
                problems.append(f"{part}: {what} is off by {worst:.2f} x its bound")
    if problems:
        raise WrongResult("\n".join([f"{backend} is wrong on {case.name}", *problems]))
