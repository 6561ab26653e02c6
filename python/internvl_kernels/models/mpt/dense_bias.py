"""Reads a dense ``attn_bias`` back into ``AttnBias``, for callers written against the original functions.

A guess is read off a few entries, then the whole tensor is rebuilt from it and compared bit for bit: the
result is exact or there is none. The check reads the bias (on a GPU: waits for it), so callers that care for
speed pass ``AttnBias``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ... import semantics
from .alibi import gen_slopes
from .bias import AttnBias, crop_to_last

_ADVICE = (
    "pass AttnBias(alibi_slopes=..., bidirectional_mask=..., key_padding_mask=..., segment_ids=...) from "
    "internvl_kernels.models.mpt.attention, or use attn_impl='torch'"
)


def recover(attn_bias: Tensor, n_heads: int, batch: int, seqlen_q: int, seqlen_k: int, is_causal: bool) -> AttnBias:
    """The ``AttnBias`` with the same attention output as the dense ``attn_bias``.

    Args:
        attn_bias: [1 or B, 1 or H, 1 or >= Sq, 1 or >= Sk]; hidden entries hold the lowest number of its dtype.
    Raises: RuntimeError (does not fit); NotImplementedError (requires a gradient, or is neither ALiBi nor a mask
        of the kernels).
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"a dense attn_bias cannot be read while tracing: {_ADVICE}")
    if attn_bias.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"attn_bias requires a gradient; only alibi_slopes can have one: {_ADVICE}")
    bias = crop_to_last(attn_bias.detach(), seqlen_q, seqlen_k)
    if not bias.any() or 0 in bias.shape:
        return AttnBias()
    bias = bias.expand(*bias.shape[:3], seqlen_k)
    p = semantics.positions(1, seqlen_q, seqlen_k, None, bias.device)[0]
    p_rows = p if bias.shape[2] == seqlen_q else p[-1:]
    future = torch.zeros((), dtype=torch.bool, device=bias.device)
    if is_causal and bias.shape[2] > 1:  # the call itself hides the future: what the bias says there does not matter
        future = ~semantics.visible_mask(1, seqlen_q, seqlen_k, device=bias.device)
    seen = ~(bias <= torch.finfo(bias.dtype).min) & ~future
    if not torch.equal(seen, seen[:, :1].expand_as(seen)):
        raise NotImplementedError(f"attn_bias hides other keys in other heads: {_ADVICE}")
    slopes = _slopes(bias, seen, p_rows, n_heads, rows_share=bias.shape[2] == 1 and seqlen_q > 1, is_causal=is_causal)
    if bool((seen | future).all()):  # nothing hidden beyond the future
        return AttnBias(alibi_slopes=slopes)
    seen = seen[:, 0].expand(batch, seqlen_q, seqlen_k)
    if is_causal:
        seen = seen & semantics.visible_mask(1, seqlen_q, seqlen_k, device=bias.device)
    return _mask_terms(slopes, seen, p, is_causal)


def _slopes(bias: Tensor, seen: Tensor, p: Tensor, n_heads: int, rows_share: bool, is_causal: bool) -> Tensor | None:
    """Slopes [H] fp32 that rebuild the visible entries of ``bias`` exactly, or None when those are 0."""
    values = bias.masked_fill(~seen, 0)
    if not values.any():
        return None
    j = torch.arange(bias.shape[-1], device=bias.device)
    behind = p[:, None] - j  # [R, Sk], keys back from the query
    row_form_holds = not rows_share or is_causal
    only_past = not bool((seen & (behind < 0)).any())
    for guess in _slope_guesses(values.float(), seen, n_heads):
        slope = guess.view(1, n_heads, 1, 1)
        forms = [semantics.alibi_bias(slope, p[:, None], j)] if not rows_share else []
        # ALiBi relative to one fixed key for every row: the same output where no query sees its future.
        if row_form_holds and (only_past or rows_share):
            steepest = int(guess.argmax())
            entry = seen[0, min(steepest, seen.shape[1] - 1)].nonzero()[-1].tolist()
            value = float(values[0, min(steepest, values.shape[1] - 1), entry[0], entry[1]])
            origin = round(entry[1] - value / float(guess[steepest]))
            forms.append(slope * (j - origin))
        for form in forms:
            if torch.equal(form.to(bias.dtype).expand_as(values).masked_fill(~seen, 0), values):
                return guess
    raise NotImplementedError(f"attn_bias is no ALiBi bias with one slope per head: {_ADVICE}")


def _slope_guesses(values: Tensor, seen: Tensor, n_heads: int):
    """Candidate slopes [H] fp32: the ones of ``gen_slopes`` that fit head 0, then the steps between columns."""
    if values.shape[1] != n_heads or values.shape[-1] < 2:
        return
    both = seen[..., 1:] & seen[..., :-1]
    step = torch.where(both, values[..., 1:] - values[..., :-1], -torch.inf)
    step = step.amax((0, 2, 3))  # [H]; behind the query the bias rises by one slope per key
    if not bool(torch.isfinite(step).all()) or not bool((step > 0).all()):
        return
    unit = gen_slopes(n_heads, 1, values.device).flatten()
    bias_max = math.log2(float(step[0])) / math.log2(float(unit[0]))
    yield gen_slopes(n_heads, round(bias_max * 64) / 64, values.device).flatten()
    yield step


def _mask_terms(slopes: Tensor | None, seen: Tensor, p: Tensor, is_causal: bool) -> AttnBias:
    """The key terms whose mask is exactly ``seen`` [B, Sq, Sk]."""
    batch, seqlen_q, seqlen_k = seen.shape
    j = torch.arange(seqlen_k, device=seen.device)
    future = j > p[:, None]
    real = seen.any(1)
    open_keys = None if is_causal else (seen & future).any(1)
    plain = AttnBias(slopes, bidirectional_mask=open_keys, key_padding_mask=real)
    # The first key a row sees names its segment: a query always sees the first real token of its own.
    first = torch.where(seen.any(2), seen.int().argmax(2), -1 - p.clamp(min=0))  # [B, Sq]
    segment = torch.full((batch, seqlen_k), -1 - seqlen_k, dtype=torch.int64, device=seen.device)
    witness = seen.int().argmax(1)  # [B, Sk], a row that sees the key
    segment = torch.where(real, first.gather(1, witness), segment)
    own = (p >= 0) & (p < seqlen_k)
    segment[:, p[own]] = first[:, own]
    packed = replace(plain, segment_ids=segment.to(torch.int32))
    for guess in (plain, packed):
        if torch.equal(guess.visible(batch, seqlen_q, seqlen_k, is_causal, seen.device), seen):
            return guess.compact()
    raise NotImplementedError(f"attn_bias hides a set of keys that is no prefix, padding or segment mask: {_ADVICE}")
