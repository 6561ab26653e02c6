"""Argument checks in Python: what fake kernels can know while tracing, and all of it for operators without C++.

``csrc/common/check.cpp`` checks the compiled operators. The full checks here raise the same sentences;
``tests/interpreter/test_operators.py`` compares them word for word. Values inside device tensors are never read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
MAX_SEQLEN = 1 << 30
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def devices(op: str, first: str, tensors: dict[str, Tensor | None]) -> None:
    """One meta tensor among real ones would send the call here, and unwritten memory back to the caller."""
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; {first} is on {device}")


def shape(op: str, name: str, tensor: Tensor | None, expected: tuple) -> None:
    """The exact shape, symbolic sizes included; None passes."""
    if tensor is not None and _differs(tensor, expected):
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected {list(expected)}")


def traced_prefix_attn(op: str, q: Tensor, k: Tensor, v: Tensor, terms: dict[str, Tensor | None]) -> None:
    """What a tracer can know of a compiled operator; check.cpp checks everything, with the same words."""
    devices(op, "q", {"q": q, "k": k, "v": v, **terms})
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected [batch, seqlen, heads, head_dim]")
    (batch, _, heads, head_dim), (_, seqlen_k, heads_kv, _) = q.shape, k.shape
    for name, tensor in (("k", k), ("v", v)):
        shape(op, name, tensor, (batch, seqlen_k, heads_kv, head_dim))
        if tensor.dtype != q.dtype:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; expected q's {q.dtype}")
    if heads_kv == 0 or heads % heads_kv != 0:
        raise ValueError(f"{op}: q has {heads} heads and k has {heads_kv}; expected a multiple")
    shapes = {"key_range": (batch, 2), "alibi_slopes": (heads,)}
    shapes |= dict.fromkeys(("key_flags", "segment_ids"), (batch, seqlen_k))
    for name, tensor in terms.items():
        shape(op, name, tensor, shapes.get(name, (batch,)))


def _differs(tensor: Tensor, expected: tuple) -> bool:
    return tensor.dim() != len(expected) or any(a != b for a, b in zip(tensor.shape, expected, strict=True))


def _dtype(dtype: torch.dtype) -> str:
    """The name that C++ prints."""
    names = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16"}
    names |= {torch.int32: "Int", torch.int64: "Long", torch.int16: "Short", torch.int8: "Char", torch.uint8: "Byte"}
    return (names | {torch.bool: "Bool"}).get(dtype, str(dtype))


def _element_type(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} has dtype {_dtype(tensor.dtype)}; allowed: Float, BFloat16, Half")


def _contiguous_last(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() and tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        stride = tensor.stride(-1)
        raise ValueError(f"{op}: {name} has stride {stride} in its last dimension; allowed: 1 (call .contiguous())")


def _mask_terms(op: str, q: Tensor, seqlen_k: int, terms: dict[str, Tensor | None]) -> None:
    batch, heads = q.shape[0], q.shape[2]
    per_row = ((batch,), "[batch]", torch.int32)
    rules = {
        "prefix_len": per_row,
        "key_range": ((batch, 2), "[batch, 2]", torch.int32),
        "query_start": per_row,
        "key_flags": ((batch, seqlen_k), "[batch, seqlen_k]", torch.uint8),
        "segment_ids": ((batch, seqlen_k), "[batch, seqlen_k]", torch.int32),
        "alibi_slopes": ((heads,), "[heads_q]", torch.float32),
    }
    for name in ("prefix_len", "key_range"):
        if terms["key_flags"] is not None and terms[name] is not None:
            raise ValueError(f"{op}: key_flags and {name} were both given; key_flags replaces {name}")
    for name, (expected, words, dtype) in rules.items():
        tensor = terms[name]
        if tensor is None:
            continue
        if _differs(tensor, expected):
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected {words} = {list(expected)}")
        if tensor.dtype != dtype:
            raise ValueError(f"{op}: {name} has dtype {_dtype(tensor.dtype)}; allowed: {_dtype(dtype)}")
        devices(op, "q", {"q": q, name: tensor})


def prefix_attn(
    q: Tensor, k: Tensor, v: Tensor, terms: dict[str, Tensor | None], softmax_scale: float | None, window: int
) -> float:
    """Everything check.cpp checks of a call, in its order. Returns: the scale to use."""
    op = "prefix_attn"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected [batch, seqlen, heads, head_dim]")
        _contiguous_last(op, name, tensor)
    _element_type(op, "q", q)
    (batch, seqlen_q, heads, head_dim), (_, seqlen_k, heads_kv, _) = q.shape, k.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{op}: {name} has dtype {_dtype(tensor.dtype)}; expected q's {_dtype(q.dtype)}")
        devices(op, "q", {"q": q, name: tensor})
        if _differs(tensor, (batch, seqlen_k, heads_kv, head_dim)):
            wanted = f"[{batch}, {seqlen_k}, {heads_kv}, {head_dim}] (q has shape {list(q.shape)})"
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected {wanted}")
    if head_dim < 1 or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"{op}: q has head_dim {head_dim}; allowed: 1 to {MAX_HEAD_DIM}")
    if heads_kv < 1 or heads < 1 or heads % heads_kv != 0:
        words = "the number of query heads must be a multiple of the number of KV heads"
        raise ValueError(f"{op}: q has {heads} heads and k has {heads_kv}; {words}")
    if seqlen_k > MAX_SEQLEN:
        raise ValueError(f"{op}: k has {seqlen_k} keys; allowed: at most {MAX_SEQLEN}")
    if seqlen_q > MAX_SEQLEN:
        raise ValueError(f"{op}: q has {seqlen_q} rows; allowed: at most {MAX_SEQLEN}")
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    if not _finite_fp32(scale):
        raise ValueError(f"{op}: softmax_scale is {scale:g}; allowed: finite fp32 numbers")
    if window < 0 or window > MAX_SEQLEN:
        raise ValueError(f"{op}: window is {window}; allowed: 0 (none) to {MAX_SEQLEN}")
    _mask_terms(op, q, seqlen_k, terms)
    return scale


def key_range_values(key_range: Tensor | None) -> None:
    """Host memory only: key_range must not be negative or decreasing; kernels clamp what is on a device."""
    for b, (start, end) in enumerate([] if key_range is None else key_range.tolist()):
        if start < 0 or end < start:
            raise ValueError(f"prefix_attn: key_range[{b}] is [{start}, {end}); allowed: 0 <= start <= end")


def prefix_attn_gradients(q: Tensor, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """The tensors that only the backward takes."""
    op = "prefix_attn_backward"
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        shape(op, name, tensor, tuple(q.shape))
        if tensor.dtype != q.dtype:
            raise ValueError(f"{op}: {name} has dtype {_dtype(tensor.dtype)}; expected {_dtype(q.dtype)}")
        devices(op, "q", {"q": q, name: tensor})
        _contiguous_last(op, name, tensor)
    expected = (q.shape[0], q.shape[2], q.shape[1])
    for name, tensor in (("lse", lse), ("grad_lse", grad_lse)):
        if tensor is None:
            continue
        if _differs(tensor, expected):
            wanted = f"[batch, heads_q, seqlen_q] = {list(expected)}"
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected {wanted}")
        if tensor.dtype != torch.float32:
            raise ValueError(f"{op}: {name} has dtype {_dtype(tensor.dtype)}; allowed: Float")
        devices(op, "q", {"q": q, name: tensor})


def _finite_fp32(number: float) -> bool:
    return math.isfinite(torch.tensor(number, dtype=torch.float32).item()) if abs(number) > 3e38 else number == number


def clip_qk_layernorm(
    qkv: Tensor, q_width: int, k_width: int, clip: float | None, parameters: dict[str, Tensor | None], eps: float
) -> None:
    """Everything check.cpp checks of a call, in its order; ``parameters``: q_weight, q_bias, k_weight, k_bias."""
    op = "clip_qk_layernorm"
    _element_type(op, "qkv", qkv)
    if q_width < 1 or k_width < 1:
        raise ValueError(f"{op}: q_width is {q_width} and k_width is {k_width}; allowed: positive widths")
    width = q_width + 2 * k_width
    if qkv.dim() == 0 or qkv.shape[-1] != width:
        words = f"[..., q_width + 2 * k_width] = [..., {width}]"
        raise ValueError(f"{op}: qkv has shape {list(qkv.shape)}; expected {words}")
    _contiguous_last(op, "qkv", qkv)
    if clip is not None and not (_finite_fp32(clip) and clip > 2.0**-150):
        words = "a positive finite fp32 number, or None for no clip"
        raise ValueError(f"{op}: clip is {clip:g}; allowed: {words}")
    if not (_finite_fp32(eps) and eps >= 0):
        raise ValueError(f"{op}: eps is {eps:g}; allowed: finite fp32 numbers >= 0")
    for part in "qk":
        if parameters[f"{part}_bias"] is not None and parameters[f"{part}_weight"] is None:
            raise ValueError(f"{op}: {part}_bias was given without {part}_weight; pass both or no bias")
    first = None
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        expected = q_width if name.startswith("q") else k_width
        shape(op, name, tensor, (expected,))
        if tensor.dtype not in (torch.float32, qkv.dtype):
            words = f"Float or qkv's {_dtype(qkv.dtype)}"
            raise ValueError(f"{op}: {name} has dtype {_dtype(tensor.dtype)}; allowed: {words}")
        if first is not None and tensor.dtype != parameters[first].dtype:
            raise ValueError(f"{op}: {name} has dtype {_dtype(tensor.dtype)}; expected the dtype of {first}")
        first = first or name
        devices(op, "qkv", {"qkv": qkv, name: tensor})


def clip_qk_layernorm_gradients(
    qkv: Tensor, widths: tuple[int, int], grads: dict[str, Tensor | None], statistics: Tensor
) -> None:
    """The tensors that only the backward takes; ``grads``: grad_q, grad_k, grad_v."""
    op = "clip_qk_layernorm_backward"
    if statistics.dtype != torch.float32 or statistics.numel() * (widths[0] + 2 * widths[1]) != 4 * qkv.numel():
        found = f"shape {list(statistics.shape)} and dtype {_dtype(statistics.dtype)}"
        words = "expected the Float statistics of the forward, 4 per row of qkv"
        raise ValueError(f"{op}: statistics has {found}; {words}")
    devices(op, "qkv", {"qkv": qkv, "statistics": statistics})
    for name, grad in grads.items():
        if grad is None:
            continue
        width = widths[name != "grad_q"]
        if _differs(grad, (*qkv.shape[:-1], width)):
            words = f"expected qkv's shape with a last dimension of {width}"
            raise ValueError(f"{op}: {name} has shape {list(grad.shape)}; {words}")
        if grad.dtype != qkv.dtype:
            raise ValueError(f"{op}: {name} has dtype {_dtype(grad.dtype)}; expected {_dtype(qkv.dtype)}")
        devices(op, "qkv", {"qkv": qkv, name: grad})
        _contiguous_last(op, name, grad)
