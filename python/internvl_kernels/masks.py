"""Boolean key masks [B, Sk] turned into the operator's compact or general key terms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import semantics


class KeyTerms(NamedTuple):
    """What the operator takes: ``prefix_len``/``key_range`` (compact) or ``key_flags`` (general)."""

    prefix_len: Tensor | None
    key_range: Tensor | None
    key_flags: Tensor | None


def key_terms(
    bidirectional_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    prefix_len: Tensor | None,
    key_range: Tensor | None,
    shape: tuple[int, int],
) -> KeyTerms:
    """Compact terms when the masks are host memory and describe one prefix and one range, else key flags.

    Device memory is never read: masks on a GPU, and masks seen by a tracer, become flags.
    """
    for name, mask, other_name, other in (
        ("bidirectional_mask", bidirectional_mask, "prefix_len", prefix_len),
        ("key_padding_mask", key_padding_mask, "key_range", key_range),
    ):
        if mask is None:
            continue
        if other is not None:
            raise ValueError(f"prefix_attention: {name} and {other_name} were both given; pass one of them")
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"prefix_attention: {name} has shape {list(mask.shape)}; expected [batch, seqlen_k] = {list(shape)}"
            )
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise ValueError(f"prefix_attention: {name} has dtype {mask.dtype}; expected bool or an integer dtype")

    for name, other, expected in (("prefix_len", prefix_len, shape[:1]), ("key_range", key_range, (*shape[:1], 2))):
        if other is not None and (tuple(other.shape) != expected or other.dtype != torch.int32):
            raise ValueError(
                f"prefix_attention: {name} has shape {list(other.shape)} and dtype {other.dtype}; "
                f"expected {list(expected)} and torch.int32"
            )

    real = None if key_padding_mask is None else key_padding_mask != 0
    bidirectional = None if bidirectional_mask is None else bidirectional_mask != 0
    if _host_readable(real, bidirectional, prefix_len, key_range):
        compact = _compact(real, bidirectional, prefix_len, key_range)
        if compact is not None:
            return compact
    given = real if real is not None else bidirectional
    j = torch.arange(shape[1], device=given.device)
    if real is None:
        if key_range is None:
            real = torch.ones_like(bidirectional)
        else:
            real = semantics.valid_in_range(j, key_range[:, :1], key_range[:, 1:])
    if bidirectional is None:
        if prefix_len is None:
            bidirectional = torch.zeros_like(real)
        else:
            bidirectional = semantics.bidirectional_in_prefix(j, prefix_len[:, None])
    flags = real * semantics.FLAG_VALID + bidirectional * semantics.FLAG_BIDIRECTIONAL
    return KeyTerms(None, None, flags.to(torch.uint8))


def _host_readable(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    return all(t is None or (type(t) is Tensor and t.device.type == "cpu") for t in tensors)


def _compact(
    real: Tensor | None, bidirectional: Tensor | None, prefix_len: Tensor | None, key_range: Tensor | None
) -> KeyTerms | None:
    """Compact terms equal to the masks, or None when the masks have holes."""
    given = real if real is not None else bidirectional
    j = torch.arange(given.shape[1])
    if real is not None:
        start = torch.where(real, j, given.shape[1]).amin(1) if given.shape[1] else j.new_zeros(given.shape[0])
        end = torch.where(real, j + 1, 0).amax(1) if given.shape[1] else start
        start = torch.minimum(start, end)  # a row without a real key is the empty range [0, 0)
        if not torch.equal(real, semantics.valid_in_range(j, start[:, None], end[:, None])):
            return None
        key_range = torch.stack([start, end], 1).to(torch.int32)
    if bidirectional is not None:
        if real is None and key_range is not None:
            real = semantics.valid_in_range(j, key_range[:, :1], key_range[:, 1:])
        open_keys = bidirectional if real is None else bidirectional & real  # what padding says does not matter
        length = torch.where(open_keys, j + 1, 0).amax(1) if given.shape[1] else j.new_zeros(given.shape[0])
        wanted = semantics.bidirectional_in_prefix(j, length[:, None])
        if not torch.equal(open_keys, wanted if real is None else wanted & real):
            return None
        prefix_len = length.to(torch.int32)
    return KeyTerms(prefix_len, key_range, None)
