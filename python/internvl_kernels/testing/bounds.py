"""The one table of tolerances: first-order rounding bounds, per element, computed from the data in float64.

They hold for every kernel that reads its inputs once, accumulates in fp32 in any order, and rounds a result once:

    a sum of n terms      off by eps / 2 * (sqrt(n) + SLACK) * sum |terms|: roundings add up like a random walk
    a score               that, times |scale|, plus 2 eps |bias|: slope, product, sum and shift are rounded apart
    lse                   the errors of the scores, weighted by their probabilities, plus 2 eps * |lse|
    a probability         relative error = error of its score plus that of lse; under ALiBi it may be left out where it
                          is below PRUNED / seqlen_k (csrc/common/prune.h)
    out, dq, dk, dv       one rounding to their dtype
    delta = dO . out      carries the rounding of out in q's dtype, hence eps(dtype) / 2 * |dO||out| in every gradient,
                          multiplied by the distances in the slopes' gradient
    dS = P (dP - delta)   keeps the rounding of its terms where they cancel (one visible key: exactly)

What a kernel may lose beyond this, by rounding P or dS to 16 bits before a product, is what eager attention loses
too: the gate grants it twice eager's own error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import semantics, variables
from .cases import Inputs

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).smallest_normal  # probabilities below it may be 0
SLACK = 8.0  # roundings that are no sum: the scale, exp2, folded constants, the rescaling of a row, the division

PRUNED = {
    torch.float32: 2.0**-30,
    torch.bfloat16: 2.0**-20,
    torch.float16: 2.0**-20,
}  # of a row's sum, all keys together

Results = dict[str, Tensor]


def _sum_error(terms: int) -> float:
    return 0.5 * EPS * (math.sqrt(max(terms, 1)) + SLACK)


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """One rounding to the nearest ``dtype``; next to zero that of its subnormal numbers."""
    info = torch.finfo(dtype)
    return 0.5 * info.eps * (1.001 * value.abs() + info.smallest_normal)


def attention_bounds(inputs: Inputs, truth: Results) -> Results:
    """Largest admissible error of each result in ``truth`` (float64 results, with or without gradients)."""
    dtype, wide, seen = inputs.q.dtype, inputs.to(torch.float64), inputs.visible()[:, None]  # [B, 1, Sq, Sk]
    dim, seqlen_k, group = wide.q.shape[3], wide.k.shape[1], wide.q.shape[2] // wide.k.shape[2]
    scale = dim**-0.5 if wide.softmax_scale is None else wide.softmax_scale
    q = wide.q.nan_to_num(0).transpose(1, 2)  # [B, Hq, Sq, D]
    k, v = (t.nan_to_num(0).repeat_interleave(group, 2).transpose(1, 2) for t in (wide.k, wide.v))
    p = semantics.positions(q.shape[0], q.shape[2], seqlen_k, wide.mask["query_start"])
    slopes = q.new_zeros(q.shape[1]) if wide.alibi_slopes is None else wide.alibi_slopes
    bias = semantics.bias_matrix(slopes, p, seqlen_k)
    lse = truth["lse"].double()[..., None].nan_to_num(neginf=0)
    prob = torch.exp(scale * (q @ k.mT) + bias - lse).nan_to_num(0).masked_fill(~seen, 0)

    score_error = _sum_error(dim) * abs(scale) * (q.abs() @ k.abs().mT) + 2 * EPS * bias.abs()
    lse_error = (prob * score_error).sum(-1, keepdim=True) + 2 * EPS * lse.abs() + _sum_error(seqlen_k)
    prob_error = prob * (score_error + lse_error) + TINY * seen  # [B, Hq, Sq, Sk]
    if wide.alibi_slopes is not None and variables.alibi_prune():
        pruned = prob.clamp(max=PRUNED.get(dtype, 0.0) / seqlen_k) * (slopes > 0)[:, None, None]
        prob_error, lse_error = prob_error + pruned, lse_error + pruned.sum(-1, keepdim=True)
    out = truth["out"].double().transpose(1, 2)
    out_error = prob_error @ v.abs()
    bounds = {"out": (out_error + _stored(out, dtype)).transpose(1, 2), "lse": lse_error[..., 0]}
    if "dq" not in truth:
        return bounds

    grad_out, grad_lse = wide.grad_out.abs().transpose(1, 2), wide.grad_lse.abs()[..., None]
    grad_prob = grad_out @ v.abs().mT  # |dO||V|: bounds dP
    delta = (prob * grad_prob).sum(-1, keepdim=True) + grad_lse
    delta_error = (0.5 * torch.finfo(dtype).eps + _sum_error(dim)) * (grad_out * out.abs()).sum(-1, keepdim=True)
    delta_error = delta_error + (grad_out * out_error).sum(-1, keepdim=True) + EPS * SLACK * grad_lse
    score_grad = prob * (grad_prob + delta)  # bounds |dS|
    error = 2 * prob_error * (grad_prob + delta) + prob * (_sum_error(dim) * grad_prob + delta_error)
    rows = q.shape[2] * group

    def of_keys(x: Tensor) -> Tensor:  # the query heads of a KV head add up: [B, Hq, Sk, D] -> [B, Sk, Hkv, D]
        return x.unflatten(1, (-1, group)).sum(2).transpose(1, 2)

    bounds["dq"] = abs(scale) * ((error + _sum_error(seqlen_k) * score_grad) @ k.abs()).transpose(1, 2)
    bounds["dk"] = abs(scale) * of_keys((error + _sum_error(rows) * score_grad).mT @ q.abs())
    bounds["dv"] = of_keys((2 * prob_error + _sum_error(rows) * prob).mT @ grad_out)
    for name in ("dq", "dk", "dv"):
        bounds[name] = bounds[name] + _stored(truth[name].double(), dtype)
    if "dalibi_slopes" in truth:
        distance = (p[:, None, :, None] - torch.arange(seqlen_k)).abs().double()
        sums = ((error + _sum_error(rows * seqlen_k) * score_grad) * distance).sum((0, 2, 3))
        bounds["dalibi_slopes"] = sums + _stored(truth["dalibi_slopes"].double(), torch.float32)
    return bounds


def layernorm_bounds(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, grad: Tensor | None = None
) -> dict[str, Tensor]:
    """Largest admissible error of a layer norm of ``x`` [R, W] (already clipped), and of its gradients.

    The mean is off by a sum's error; constant rows magnify that by 1 / std. Keys: y, dx, dweight, dbias.
    """
    dtype, w = x.dtype, weight.double()
    rows, width = x.shape
    x = x.double()
    mean = x.mean(-1, keepdim=True)
    inverse_std = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    normal = (x - mean) * inverse_std
    centred = inverse_std * _sum_error(width) * x.abs().mean(-1, keepdim=True) + inverse_std * EPS * x.abs()
    rel_std = _sum_error(width) + centred.mean(-1, keepdim=True)
    normal_error = centred + normal.abs() * rel_std
    y = normal * w + (0 if bias is None else bias.double())
    shift = 0 if bias is None else EPS * bias.double().abs()
    bounds = {"y": normal_error * w.abs() + EPS * (normal * w).abs() + shift + _stored(y, dtype)}
    if grad is None:
        return bounds
    dy = grad.double().abs()
    scaled = dy * w.abs()
    mean_dot = (scaled * normal.abs()).mean(-1, keepdim=True)
    terms = scaled + scaled.mean(-1, keepdim=True) + normal.abs() * mean_dot  # bound dx / inverse_std
    error = (_sum_error(width) + rel_std) * terms + normal_error * mean_dot
    error = error + normal.abs() * (scaled * normal_error).mean(-1, keepdim=True)
    # dx is off by its rounding at most, and |dx| <= inverse_std * terms.
    bounds["dx"] = inverse_std * error + _stored(inverse_std * terms, dtype)
    dweight = (dy * normal_error).sum(0) + _sum_error(rows) * (dy * normal.abs()).sum(0)
    bounds["dweight"] = dweight + _stored((dy * normal.abs()).sum(0), weight.dtype)
    bounds["dbias"] = _sum_error(rows) * dy.sum(0) + _stored(dy.sum(0), weight.dtype)
    return bounds
