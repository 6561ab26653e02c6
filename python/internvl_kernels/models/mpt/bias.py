"""What a dense ``attn_bias`` says, without the S x S tensor: slopes and key terms for the fused kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import masks, semantics


@dataclass(frozen=True)
class AttnBias:
    """Structured bias and mask; pass it as ``attn_bias`` to the attention functions, modules and blocks.

    Key j is visible from position p when it is real, of p's segment, and bidirectional or not after p. ALiBi
    positions are key indices: padding does not shift them.

    Args:
        alibi_slopes: [H] fp32. None: no ALiBi.
        bidirectional_mask: [B, Sk] bool, keys every query may see, or ``prefix_len`` [B] int32. Both None: the
            mask says nothing, ``is_causal`` of the call decides between causal and full attention.
        key_padding_mask: [B, Sk] bool, True = real key, or ``key_range`` [B, 2] int32. Both None: all real.
        segment_ids: [B, Sk] int32, packed documents. None: one segment.
    """

    alibi_slopes: Tensor | None = None
    bidirectional_mask: Tensor | None = None
    prefix_len: Tensor | None = None
    key_padding_mask: Tensor | None = None
    key_range: Tensor | None = None
    segment_ids: Tensor | None = None

    def compact(self) -> AttnBias:
        """The same masks as ``prefix_len`` and ``key_range`` when host memory shows that they are; for many layers."""
        given = self.bidirectional_mask if self.bidirectional_mask is not None else self.key_padding_mask
        if given is None:
            return self
        terms = masks.key_terms(
            self.bidirectional_mask, self.key_padding_mask, self.prefix_len, self.key_range, tuple(given.shape)
        )
        if terms.key_flags is not None:
            return self
        short = {"prefix_len": terms.prefix_len, "key_range": terms.key_range}
        return replace(self, bidirectional_mask=None, key_padding_mask=None, **short)

    def with_padding(self, key_padding_mask: Tensor | None) -> AttnBias:
        """Also hide the keys where ``key_padding_mask`` [B, Sk] is False."""
        if key_padding_mask is None:
            return self
        real = key_padding_mask.bool()
        if self.key_padding_mask is not None:
            real = real & self.key_padding_mask.bool()
        elif self.key_range is not None:
            j = torch.arange(real.shape[1], device=real.device)
            real = real & semantics.valid_in_range(j, self.key_range[:, :1], self.key_range[:, 1:])
        return replace(self, key_padding_mask=real, key_range=None)

    def kernel_arguments(self, is_causal: bool, seqlen_k: int) -> dict:
        """Keyword arguments of ``prefix_attention``; ``is_causal`` hides the future on top of everything else."""
        if is_causal:
            prefix = {}
        elif self.bidirectional_mask is None and self.prefix_len is None:
            prefix = {"prefix_len": seqlen_k}
        else:
            prefix = {"prefix_len": self.prefix_len, "bidirectional_mask": self.bidirectional_mask}
        return {
            **prefix,
            "key_range": self.key_range,
            "key_padding_mask": self.key_padding_mask,
            "segment_ids": self.segment_ids,
            "alibi_slopes": self.alibi_slopes,
        }

    def visible(self, batch: int, seqlen_q: int, seqlen_k: int, is_causal: bool, device=None) -> Tensor:
        """The mask as a bool tensor [B, Sq, Sk]."""
        prefix_len = None
        bidirectional = self.bidirectional_mask
        if is_causal:
            bidirectional = None
        elif bidirectional is None:
            full = torch.full((batch,), seqlen_k, device=device)
            prefix_len = full if self.prefix_len is None else self.prefix_len
        terms = {"prefix_len": prefix_len, "key_range": self.key_range}
        if bidirectional is not None or self.key_padding_mask is not None:
            terms = masks.key_terms(
                bidirectional, self.key_padding_mask, prefix_len, self.key_range, (batch, seqlen_k)
            )._asdict()
        return semantics.visible_mask(batch, seqlen_q, seqlen_k, segment_ids=self.segment_ids, device=device, **terms)

    def dense(self, seqlen_q: int, seqlen_k: int, is_causal: bool) -> Tensor | None:
        """The fp32 bias [B, 1 or H, Sq, Sk] for eager attention: ALiBi, and the lowest fp32 number where hidden."""
        given = [t for t in self.__dict__.values() if t is not None]
        if not given:
            return None
        device = given[0].device
        others = [t for name, t in self.__dict__.items() if t is not None and name != "alibi_slopes"]
        batch = others[0].shape[0] if others else 1
        p = semantics.positions(1, seqlen_q, seqlen_k, None, device)
        bias = torch.zeros(1, 1, 1, seqlen_k, device=device)
        if self.alibi_slopes is not None:
            bias = semantics.bias_matrix(self.alibi_slopes.float(), p, seqlen_k)
        seen = self.visible(batch, seqlen_q, seqlen_k, is_causal, device)
        return bias.masked_fill(~seen[:, None], torch.finfo(torch.float32).min)


def crop_to_last(attn_bias: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The last ``seqlen_q`` rows and ``seqlen_k`` columns of a 4-D bias; an axis of size 1 broadcasts.

    Raises: RuntimeError when what remains does not fit.
    """
    cropped = attn_bias[..., max(0, attn_bias.shape[-2] - seqlen_q) :, max(0, attn_bias.shape[-1] - seqlen_k) :]
    if cropped.shape[-1] not in (1, seqlen_k) or cropped.shape[-2] not in (1, seqlen_q):
        raise RuntimeError(
            f"attn_bias has shape {list(attn_bias.shape)}; its last two sizes must be 1 or at least "
            f"[seqlen_q, seqlen_k] = {[seqlen_q, seqlen_k]}"
        )
    return cropped
