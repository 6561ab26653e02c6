"""What the tokens of one forward pass see: the kernels' terms where a mask has that form, else a dense mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ... import semantics
from ...functional import prefix_attention
from ...masks import key_terms


def _make_causal_mask(
    input_ids_shape, dtype: torch.dtype, device: torch.device | str, past_key_values_length: int = 0
) -> Tensor:
    """[B, 1, S, past + S]: 0 where a query sees the key, the lowest number of ``dtype`` in its future."""
    batch, seqlen = input_ids_shape
    seen = semantics.visible_mask(1, seqlen, past_key_values_length + seqlen, device=device)  # [1, S, T]
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[:, None].expand(batch, 1, *seen.shape[1:])


def _expand_mask(mask: Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> Tensor:
    """Padding mask [B, T], 1 = real, as [B, 1, tgt_len or T, T]: 0 or the lowest number of ``dtype``."""
    batch, seqlen_k = mask.shape
    hidden = (mask == 0)[:, None, None].expand(batch, 1, seqlen_k if tgt_len is None else tgt_len, seqlen_k)
    return torch.zeros(hidden.shape, dtype=dtype, device=mask.device).masked_fill(hidden, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Span:
    """Query rows [begin, end) over the first ``keys`` keys (None: all), with the kernel's arguments."""

    begin: int
    end: int
    keys: int | None = None
    terms: dict = field(default_factory=dict)


@dataclass(frozen=True)
class SelfMask:
    """Self-attention through the kernels: nothing in it is larger than [B, Sk]."""

    spans: tuple[Span, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S, H, D], k, v [B, T, Hkv, D] -> [B, S, H, D]; a row without a visible key gives 0."""
        outs = []
        for span in self.spans:
            # layers of one model may live on several devices; what is there already is not copied
            terms = {name: t.to(q.device) if isinstance(t, Tensor) else t for name, t in span.terms.items()}
            rows = q[:, span.begin : span.end]
            outs.append(prefix_attention(rows, k[:, : span.keys], v[:, : span.keys], **terms))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def full_mask(seqlen: int, seqlen_k: int) -> SelfMask:
    """Every query sees every key."""
    return SelfMask((Span(0, seqlen, terms={"prefix_len": seqlen_k}),))


def self_mask(
    shape: tuple[int, int], start: int | Tensor, attention_mask: Tensor | None, num_query_token: int
) -> SelfMask:
    """Causal attention whose first ``num_query_token`` positions are a block that sees all of itself.

    Positions are those of the whole sequence, cached tokens included. Queries of the block see all of the block,
    padding or not; all other tokens see what is real and not in their future.
    Args:
        shape: [B, S] of the new tokens.
        start: cached tokens; a tensor (a static cache inside a compiled graph) means a step behind the block.
        attention_mask: [B, T] bool or int, 1 = real; T = start + S, or the length of the static buffer.
        num_query_token: 0 = plain causal attention.
    """
    batch, seqlen = shape
    real = None if attention_mask is None else attention_mask != 0
    if isinstance(start, Tensor):
        terms = {"query_start": start.to(torch.int32).expand(batch)}
        if real is not None:
            terms["key_padding_mask"] = real
        return SelfMask((Span(0, seqlen, terms=terms),))
    block = min(num_query_token, start + seqlen)  # keys of the block that exist
    rows = min(max(num_query_token - start, 0), seqlen)  # new tokens that belong to it
    if real is None:
        return SelfMask((Span(0, seqlen, terms=_terms(None, block, batch)),))
    if rows == 0:
        return SelfMask((Span(0, seqlen, terms=_terms(real, 0, batch)),))
    if _readable(real) and bool(real[:, :block].all()):
        return SelfMask((Span(0, seqlen, terms=_terms(real, block, batch)),))
    of_block = Span(0, rows, block, {"prefix_len": block})
    if rows == seqlen:
        return SelfMask((of_block,))
    return SelfMask((of_block, Span(rows, seqlen, terms=_terms(real, 0, batch))))


def _terms(real: Tensor | None, prefix_len: int, batch: int) -> dict:
    """Kernel arguments, compact where the mask can be read without waiting for a device; once, not per layer."""
    prefix = None
    if prefix_len:
        prefix = torch.full((batch,), prefix_len, dtype=torch.int32, device=None if real is None else real.device)
    if real is None:
        return {"prefix_len": prefix_len} if prefix_len else {}
    compact = key_terms(None, real, prefix, None, tuple(real.shape))
    if compact.key_flags is None:
        return {"prefix_len": compact.prefix_len, "key_range": compact.key_range}
    return {"prefix_len": prefix, "key_padding_mask": real}


def recognise(mask: Tensor) -> SelfMask | None:
    """The kernels' form of a dense additive mask [B, 1, S, T], or None when it has none or cannot be read.

    A mask on a GPU, or seen by a tracer, is not read. Entries must be 0, or so low that softmax gives 0.
    """
    if not _readable(mask) or mask.requires_grad or 0 in mask.shape:
        return None
    batch, _, seqlen, seqlen_k = mask.shape
    if not bool(mask.any()):
        return full_mask(seqlen, seqlen_k)
    seen = (mask == 0)[:, 0]
    if not bool((seen | (mask[:, 0] <= torch.finfo(mask.dtype).min / 2)).all()):
        return None
    past = semantics.visible_mask(1, seqlen, seqlen_k, device=mask.device)
    real, open_keys = seen.any(1), (seen & ~past).any(1)
    if not torch.equal(seen, semantics.visible(real[:, None], True, open_keys[:, None], past)):
        return None
    compact = key_terms(open_keys, real, None, None, (batch, seqlen_k))
    if compact.key_flags is None:
        terms = {"prefix_len": compact.prefix_len, "key_range": compact.key_range}
    else:
        terms = {"bidirectional_mask": open_keys, "key_padding_mask": real}
    return SelfMask((Span(0, seqlen, terms=terms),))


def dense_mask(
    shape: tuple[int, int], start: int, attention_mask: Tensor | None, num_query_token: int, like: Tensor
) -> Tensor:
    """``self_mask`` as an additive tensor [B, 1, S, T]; only for attention weights that a caller asked for."""
    seqlen = shape[1]
    mask = _make_causal_mask(shape, like.dtype, like.device, start)
    if attention_mask is not None:
        mask = mask + _expand_mask(attention_mask, like.dtype, seqlen)
    rows = min(max(num_query_token - start, 0), seqlen)
    mask = mask.clone()
    mask[:, :, :rows, :num_query_token] = 0
    return mask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, needs_weights: bool):
    """Attention under an arbitrary additive mask [B, 1, S, T]; the masks the kernels know do not come here.

    A row without a visible key attends uniformly, as in the original.
    Args:
        q: [B, S, H, D]; k, v: [B, T, Hkv, D].
    Returns: out [B, S, H, D]; weights [B, H, S, T] in q's dtype, or None.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
    if not needs_weights:
        grouped = q.shape[1] != k.shape[1]
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2), None
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = (scores + mask).clamp(min=torch.finfo(q.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


def _readable(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
