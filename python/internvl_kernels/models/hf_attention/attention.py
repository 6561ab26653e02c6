"""The attention interface: q, k, v [B, H, S, D] of a Hugging Face layer through ``prefix_attention``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import semantics
from ...functional import prefix_attention
from .blocks import attend_with_blocks
from .carrier import KeyCarrier, Window, decode, is_carrier
from .dense import dense_attention
from .warn import warn_once

MAX_HEAD_DIM = 256


def internvl_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    alibi_slopes: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls with ``attn_implementation="internvl"``.

    Args:
        query: [B, Hq, Sq, D]; key, value: [B, Hkv, Sk, D], Hq a multiple of Hkv.
        attention_mask: a key carrier; a key mask [B, Sk] (1 = real); a dense bool or additive mask; or None.
        scaling: before the bias. Default: what the layer says, else 1 / sqrt(D).
        is_causal: for masks that do not say it (None, [B, Sk]). Default: ``module.is_causal``, else True.
        alibi_slopes: [Hq] fp32.
        kwargs: of the model; those that change the result and that the kernels cannot express lead to dense attention
            (``softcap``, ``s_aux``, ``position_bias``, ``head_mask``, ``output_attentions``), with one warning.
    Returns: out [B, Sq, Hq, D]; the weights [B, Hq, Sq, Sk] of the dense path when they were asked for, else None.
    Raises: ValueError (a carrier of another length, a window that nobody knows); NotImplementedError (paged cache).
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError("attn_implementation='internvl' has no paged cache; use generate, not generate_batch")
    scaling = _layer_scale(module, query.shape[-1]) if scaling is None else scaling
    if not is_carrier(attention_mask) and (attention_mask is None or attention_mask.dim() == 2):
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        carrier = _plain(attention_mask, bool(is_causal), query, key)
    elif is_carrier(attention_mask):
        carrier = decode(attention_mask, key.shape[2])
    else:
        carrier = None
    reason = _dense_reason(carrier, query, value, dropout, kwargs)
    window = 0 if carrier is None else _window(carrier.window, module, kwargs)
    start = None if carrier is None else carrier.query_start(query.shape[2])
    if reason is not None:
        warn_once(reason, f"attn_implementation='internvl': {reason}; attention runs as dense attention, slower")
        mask = attention_mask if carrier is None else visible(carrier, query.shape[2], window)
        if carrier is not None and carrier.weights:
            kwargs["output_attentions"] = True
        return dense_attention(query, key, value, mask, scaling, alibi_slopes, start, dropout, **kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    terms = {"alibi_slopes": alibi_slopes, "softmax_scale": scaling, "query_start": start}
    if carrier.block_ids is not None:
        past_window = window if carrier.window is Window.CONFIG else 0
        return attend_with_blocks(q, k, v, carrier, window, past_window, terms), None
    segments = carrier.segment_ids
    out = prefix_attention(q, k, v, key_flags=carrier.key_flags, segment_ids=segments, window=window, **terms)
    return out, None


def visible(carrier: KeyCarrier, seqlen_q: int, window: int) -> Tensor:
    """The carrier's mask as bool [B, 1, Sq, Sk]."""
    batch, seqlen_k = carrier.key_flags.shape
    size = (batch, seqlen_q, seqlen_k)
    terms = {"query_start": carrier.query_start(seqlen_q), "device": carrier.key_flags.device}
    flags, segments = carrier.key_flags, carrier.segment_ids
    seen = semantics.visible_mask(*size, key_flags=flags, segment_ids=segments, window=window, **terms)
    if carrier.block_ids is not None:
        p = semantics.positions(*size, terms["query_start"], flags.device)
        own = carrier.block_ids.long().gather(1, p.clamp(0, seqlen_k - 1))
        same = (own[:, :, None] == carrier.block_ids[:, None]) & (own >= 0)[:, :, None]
        same = same & semantics.flag_valid(flags)[:, None]
        if carrier.window is Window.CONFIG_AND_BLOCKS:
            j = torch.arange(seqlen_k, device=flags.device)
            same = same & (p[:, :, None] - j < window)
        seen = seen | same
    return seen[:, None]


def _plain(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> KeyCarrier:
    """Of a key mask [B, Sk] or no mask at all: causal with the last query at the last key, or full attention."""
    real = semantics.FLAG_VALID | (0 if is_causal else semantics.FLAG_BIDIRECTIONAL)
    if mask is None:
        flags = torch.full((key.shape[0], key.shape[2]), real, dtype=torch.uint8, device=query.device)
    else:
        flags = ((mask != 0) * real).to(torch.uint8)
    return KeyCarrier(flags, None, None, None, Window.LAYER if is_causal else Window.NONE)


def _layer_scale(module: nn.Module, head_dim: int) -> float:
    """GPT-2 of transformers 4 keeps its scale to itself."""
    scale = head_dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scale / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale


def _window(origin: Window, module: nn.Module, kwargs: dict) -> int:
    if origin is Window.NONE:
        return 0
    window = kwargs.get("sliding_window")
    if origin is Window.LAYER:
        return window or 0
    for holder in (module, getattr(module, "config", None)):
        window = window or getattr(holder, "sliding_window", None)
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"{type(module).__name__} has a sliding-window mask and no sliding_window")
    return window


def _dense_reason(carrier: KeyCarrier | None, query: Tensor, value: Tensor, dropout: float, kwargs: dict) -> str | None:
    """Why the kernels cannot do it, or None."""
    if carrier is None:
        return "a dense mask was given"
    if dropout:
        return f"attention dropout is {dropout} while training, and the kernels have none (set it to 0)"
    if carrier.weights or kwargs.get("output_attentions"):
        return "output_attentions asks for the weights, which the kernels never form"
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            return f"the model uses {name}, which the kernels do not have"
    if value.shape[-1] != query.shape[-1] or query.shape[-1] > MAX_HEAD_DIM:
        dims = f"{query.shape[-1]} and {value.shape[-1]} (values)"
        return f"head dims are {dims}; the kernels take one for both, up to {MAX_HEAD_DIM}"
    return None
