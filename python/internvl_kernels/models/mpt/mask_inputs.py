"""The masks of one forward pass: checked, and turned into what the attention implementation takes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .alibi import build_alibi_bias, gen_slopes
from .bias import AttnBias


@dataclass(frozen=True)
class MaskInputs:
    """Key masks over all ``seqlen_k`` keys, cached ones included; each [B, Sk] or None."""

    attention_mask: Tensor | None  # bool, True = real
    prefix_mask: Tensor | None  # bool, True = visible to every query
    sequence_id: Tensor | None  # integer, packed documents

    @classmethod
    def check(
        cls,
        config,
        training: bool,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        prefix_mask: Tensor | None,
        sequence_id: Tensor | None,
    ) -> MaskInputs:
        """Raises: ValueError (missing, or not ``shape`` = [B, Sk]); NotImplementedError (left padding in training)."""
        attn = config.attn_config
        if attn["prefix_lm"] and prefix_mask is None:
            raise ValueError("prefix_mask is None; a model with prefix_lm needs one of shape [batch, keys]")
        if not attn["prefix_lm"] and prefix_mask is not None:
            raise ValueError("prefix_mask was given; this model is causal (attn_config['prefix_lm'] is False)")
        if attn["attn_uses_sequence_id"] and sequence_id is None and training:
            raise ValueError("sequence_id is None; training with attn_uses_sequence_id needs it")
        if not attn["attn_uses_sequence_id"] and sequence_id is not None:
            warnings.warn(
                "sequence_id was given and is ignored: attn_config['attn_uses_sequence_id'] is False", stacklevel=3
            )
            sequence_id = None
        for name, mask in (
            ("attention_mask", attention_mask),
            ("prefix_mask", prefix_mask),
            ("sequence_id", sequence_id),
        ):
            if mask is not None and tuple(mask.shape) != shape:
                raise ValueError(
                    f"{name} has shape {list(mask.shape)}; expected [batch, keys] = {list(shape)}, cached keys included"
                )
        attention_mask = None if attention_mask is None else attention_mask.bool()
        # A tracer cannot read the mask; left padding while training then goes unnoticed.
        readable = attention_mask is not None and not torch.compiler.is_compiling()
        if training and readable and not bool(attention_mask[:, 0].all()):
            raise NotImplementedError("attention_mask pads on the left; training needs padding on the right")
        return cls(attention_mask, None if prefix_mask is None else prefix_mask.bool(), sequence_id)

    def fused_bias(self, config, device: torch.device) -> AttnBias:
        """What the kernels take; nothing in it is larger than [B, Sk]."""
        attn = config.attn_config
        slopes = None
        if attn["alibi"]:
            slopes = gen_slopes(config.n_heads, attn["alibi_bias_max"], device).flatten()
        segments = None if self.sequence_id is None else self.sequence_id.to(torch.int32)
        bias = AttnBias(
            alibi_slopes=slopes,
            bidirectional_mask=self.prefix_mask,
            key_padding_mask=self.attention_mask,
            segment_ids=segments,
        )
        return bias.compact()

    def dense_bias(self, config, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor | None:
        """The eager path's bias [1 or B, 1 or H, 1 or Sq, Sk], fp32, for the current length."""
        attn = config.attn_config
        bias = None
        if attn["alibi"]:
            # Causal rows differ from true distances by a constant per row, which softmax removes.
            full = attn["prefix_lm"]
            bias = build_alibi_bias(
                config.n_heads, seqlen_k, full, attn["alibi_bias_max"], device=device, dtype=torch.float32
            )[:, :, -seqlen_q:]
        terms = AttnBias(
            bidirectional_mask=self.prefix_mask,
            key_padding_mask=self.attention_mask,
            segment_ids=None if self.sequence_id is None else self.sequence_id.to(torch.int32),
        )
        if self.prefix_mask is None and self.sequence_id is None:
            if self.attention_mask is None:
                return bias
            hidden = ~self.attention_mask[:, None, None, :]
        else:
            batch = (self.prefix_mask if self.prefix_mask is not None else self.sequence_id).shape[0]
            hidden = ~terms.visible(batch, seqlen_q, seqlen_k, not attn["prefix_lm"], device)[:, None]
        if bias is None:
            bias = torch.zeros(1, 1, 1, seqlen_k, device=device)
        return bias.masked_fill(hidden, torch.finfo(torch.float32).min)
