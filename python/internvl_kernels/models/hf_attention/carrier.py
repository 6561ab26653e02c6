"""The key carrier: what a Hugging Face model passes along as ``attention_mask`` instead of an S x S mask.

A uint8 tensor [B, W, R, Sk]. Every transformers model hands a 4-D mask through to its attention layers untouched,
and being an ordinary argument it survives gradient checkpointing, device maps, wrappers and copies.

    plane 0      key_flags, as ``prefix_attn`` takes them: bit 0 real, bit 1 visible to every query
    plane 1      with a static cache: 1 in the slots written so far (the last query meets the last of them)
    4 planes     packed documents: the bytes of int32 segment_ids
    4 planes     blocks: the bytes of int32 block ids; the tokens of a block see each other in both directions

R, the number of planes, says which of them are there: 1 + (1) + (4) + (4), blocks always after segments. W says whose
window limits the causal keys (``Window``), plus WEIGHTS when the caller wants the attention weights back; it is an
expanded dimension and takes no memory.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ... import semantics

WEIGHTS = 4


class Window(IntEnum):
    """Where the sliding window comes from; the value is the carrier's second size (less WEIGHTS)."""

    NONE = 1  # causal keys are never too old
    CONFIG = 2  # the model's sliding window: missing is an error
    LAYER = 3  # the layer says (``sliding_window``); None: no window
    CONFIG_AND_BLOCKS = 4  # as CONFIG; it limits the past keys of the query's own block, too


class KeyCarrier(NamedTuple):
    """A decoded carrier: [B, Sk] tensors, and the window's origin."""

    key_flags: Tensor  # uint8
    written: Tensor | None  # uint8
    segment_ids: Tensor | None  # int32
    block_ids: Tensor | None  # int32, negative: in no block
    window: Window
    weights: bool = False

    def query_start(self, seqlen_q: int) -> Tensor | None:
        """[B] int32, or None for the operator's default (the last query meets the last key)."""
        if self.written is None:
            return None
        return self.written.sum(1, dtype=torch.int32) - seqlen_q


def encode(
    key_flags: Tensor,
    written: Tensor | None = None,
    segment_ids: Tensor | None = None,
    block_ids: Tensor | None = None,
    window: Window = Window.NONE,
    weights: bool = False,
) -> Tensor:
    """The carrier of [B, Sk] tensors."""
    planes = [key_flags.to(torch.uint8)[:, None]]
    if written is not None:
        planes.append(written.to(torch.uint8).expand_as(key_flags)[:, None])
    if segment_ids is None and block_ids is not None:
        segment_ids = torch.zeros_like(block_ids)
    for ids in (segment_ids, block_ids):
        if ids is not None:
            planes.append(_to_bytes(ids.expand_as(key_flags)))
    packed = planes[0] if len(planes) == 1 else torch.cat(planes, 1)
    return packed[:, None].expand(-1, window + WEIGHTS * weights, -1, -1)


def is_carrier(mask) -> bool:
    """Whether an attention mask is a carrier: no model builds 4-D uint8 masks of its own."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.uint8


def decode(carrier: Tensor, seqlen_k: int) -> KeyCarrier:
    """Raises ValueError when the carrier was made for another number of keys."""
    _, form, planes, keys = carrier.shape
    if keys != seqlen_k:
        raise ValueError(f"the key carrier describes {keys} keys; attention was called with {seqlen_k}")
    first = 1 + (planes % 4 == 2)
    return KeyCarrier(
        key_flags=carrier[:, 0, 0],
        written=carrier[:, 0, 1] if first == 2 else None,
        segment_ids=_to_int32(carrier[:, 0, first : first + 4]) if planes >= first + 4 else None,
        block_ids=_to_int32(carrier[:, 0, first + 4 : first + 8]) if planes == first + 8 else None,
        window=Window(form - WEIGHTS if form > WEIGHTS else form),
        weights=form > WEIGHTS,
    )


def _to_bytes(ids: Tensor) -> Tensor:
    """int [B, Sk] -> uint8 [B, 4, Sk]."""
    return ids.to(torch.int32).contiguous()[..., None].view(torch.uint8).transpose(1, 2)


def _to_int32(planes: Tensor) -> Tensor:
    """uint8 [B, 4, Sk] -> int32 [B, Sk]."""
    return planes.transpose(1, 2).contiguous().view(torch.int32)[..., 0]


def without_prefix(carrier: Tensor) -> Tensor:
    """The same carrier with no key visible to every query."""
    planes = carrier[:, :1].clone()
    planes[:, :, 0] &= semantics.FLAG_VALID
    return planes.expand_as(carrier)
