"""Loads the operator library and adds what PyTorch expects of an operator: fake, autograd and autocast.

The schemas stand in ``csrc/ops.cpp``. ``prefix_attn`` has keyword-only tensors, which
``torch.library.register_autograd`` refuses, so its autograd kernel is written out here.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor

from . import checks

_FOLDER = Path(__file__).parent
LIBRARY_ERROR: str | None = None


def library_path() -> str | None:
    """File of the loaded operator library, or None when it is not built."""
    found = sorted(_FOLDER.glob("_ops*.so"))
    return str(found[0]) if found else None


def _load() -> str | None:
    path = library_path()
    if path is None:
        return "the compiled library is missing: run `make build` or `pip install --no-build-isolation .`"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the compiled library does not load ({error}); rebuild it with `make build`"
    return None


def _isa_error() -> str | None:
    try:
        torch.ops.internvl.cpu_isa()
    except ValueError as error:
        return str(error)
    return None


def build_info() -> dict:
    """What was compiled (version, cuda, head dims, ISAs), from ``_C``; empty when it is not built."""
    return dict(_BUILD_INFO)


def cpu_info() -> dict:
    """Compiled ISAs, those this processor runs, and the one in use; empty when nothing is built."""
    if LIBRARY_ERROR:
        return {}
    rows = importlib.import_module("internvl_kernels._C").cpu_isas()
    return {
        "isa": None if ISA_ERROR else rows[torch.ops.internvl.cpu_isa()]["name"],
        "compiled": [row["name"] for row in rows if row["compiled"]],
        "supported": [row["name"] for row in rows if row["compiled"] and row["supported"]],
    }


def _fake_prefix_attn(
    q,
    k,
    v,
    *,
    prefix_len=None,
    key_range=None,
    query_start=None,
    key_flags=None,
    segment_ids=None,
    alibi_slopes=None,
    softmax_scale=None,
    window=0,
):
    terms = {"prefix_len": prefix_len, "key_range": key_range, "query_start": query_start, "key_flags": key_flags}
    checks.traced_prefix_attn(
        "prefix_attn", q, k, v, {**terms, "segment_ids": segment_ids, "alibi_slopes": alibi_slopes}
    )
    batch, seqlen_q, heads_q, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)


def _fake_prefix_attn_backward(
    grad_out, grad_lse, q, k, v, out, lse, *, alibi_slopes=None, softmax_scale=None, window=0, **terms
):
    op = "prefix_attn_backward"
    checks.traced_prefix_attn(op, q, k, v, {**terms, "alibi_slopes": alibi_slopes})
    checks.devices(op, "q", {"q": q, "grad_out": grad_out, "grad_lse": grad_lse, "out": out, "lse": lse})
    slopes = q.new_empty((0 if alibi_slopes is None else q.shape[2],), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), slopes


class _PrefixAttn(torch.autograd.Function):
    """Autograd of ``internvl::prefix_attn``; first derivatives only."""

    @staticmethod
    def forward(ctx, keyset, q, k, v, alibi_slopes, masks, softmax_scale, window):
        out, lse = _below_autograd(keyset, q, k, v, alibi_slopes, masks, softmax_scale, window)
        ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, *masks.values())
        ctx.mask_names, ctx.softmax_scale, ctx.window = tuple(masks), softmax_scale, window
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, alibi_slopes, *masks = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 8
        dq, dk, dv, dslopes = torch.ops.internvl.prefix_attn_backward.default(
            torch.zeros_like(out) if grad_out is None else dense_rows(grad_out),
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            alibi_slopes=alibi_slopes,
            softmax_scale=ctx.softmax_scale,
            window=ctx.window,
            **dict(zip(ctx.mask_names, masks, strict=True)),
        )
        return None, dq, dk, dv, (None if alibi_slopes is None else dslopes), None, None, None


def dense_rows(grad: Tensor) -> Tensor:
    """The gradient with a contiguous last dimension (an expanded one, from ``sum()``, has stride 0)."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _below_autograd(keyset, q, k, v, alibi_slopes, masks, softmax_scale, window):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.internvl.prefix_attn.default.redispatch(
            keyset & torch._C._after_autograd_keyset,
            q,
            k,
            v,
            alibi_slopes=alibi_slopes,
            softmax_scale=softmax_scale,
            window=window,
            **masks,
        )


def _prefix_attn_autograd(
    keyset,
    q,
    k,
    v,
    *,
    prefix_len=None,
    key_range=None,
    query_start=None,
    key_flags=None,
    segment_ids=None,
    alibi_slopes=None,
    softmax_scale=None,
    window=0,
):
    masks = {
        "prefix_len": prefix_len,
        "key_range": key_range,
        "query_start": query_start,
        "key_flags": key_flags,
        "segment_ids": segment_ids,
    }
    run = _below_autograd
    if torch.is_grad_enabled() and torch._C._any_requires_grad(q, k, v, alibi_slopes):
        run = _PrefixAttn.apply
    return run(keyset, q, k, v, alibi_slopes, masks, softmax_scale, window)


def prefix_attn_autocast(operator, device_type: str):
    """q, k and v of ``operator`` in the autocast dtype, like scaled_dot_product_attention; slopes stay fp32."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def run(keyset, q, k, v, *terms, **rest):
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (t.to(dtype) if t.dtype.is_floating_point and t.dtype != torch.float64 else t for t in (q, k, v))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(q, k, v, *terms, **rest)

    return run


def fake_clip_qk_layernorm(qkv, q_width, k_width, clip, q_weight, q_bias, k_weight, k_bias, eps):
    op = "clip_qk_layernorm"
    parameters = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    checks.devices(op, "qkv", {"qkv": qkv, **parameters})
    if qkv.dim() == 0 or qkv.shape[-1] != q_width + 2 * k_width:
        raise ValueError(f"{op}: qkv has shape {list(qkv.shape)}; expected [..., {q_width + 2 * k_width}]")
    for name, parameter in parameters.items():
        checks.shape(op, name, parameter, (q_width if name.startswith("q") else k_width,))
    rows = qkv.shape[:-1]
    q, k, v = (qkv.new_empty((*rows, width)) for width in (q_width, k_width, k_width))
    return q, k, v, qkv.new_empty((*rows, 4), dtype=torch.float32)


def fake_clip_qk_layernorm_backward(
    grad_q, grad_k, grad_v, qkv, q_width, k_width, clip, q_weight, k_weight, statistics
):
    tensors = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v, "q_weight": q_weight, "k_weight": k_weight}
    checks.devices("clip_qk_layernorm_backward", "qkv", {"qkv": qkv, **tensors, "statistics": statistics})

    def like(weight, width):
        return qkv.new_empty((0 if weight is None else width,), dtype=torch.float32)

    q_grads = (like(q_weight, q_width), like(q_weight, q_width))
    return (qkv.new_empty(qkv.shape), *q_grads, like(k_weight, k_width), like(k_weight, k_width))


def save_clip_qk_layernorm(ctx, inputs, output):
    qkv, q_width, k_width, clip, q_weight, q_bias, k_weight, k_bias, _ = inputs
    ctx.save_for_backward(qkv, q_weight, k_weight, output[3])
    ctx.widths, ctx.clip = (q_width, k_width), clip
    ctx.parameters = (q_weight, q_bias, k_weight, k_bias)
    ctx.parameters = tuple(None if p is None else p.dtype for p in ctx.parameters)
    ctx.set_materialize_grads(False)


def clip_qk_layernorm_gradients(operator, ctx, grad_q, grad_k, grad_v, _grad_statistics):
    """Backward of ``clip_qk_layernorm`` through ``operator``: gradients of its nine arguments."""
    qkv, q_weight, k_weight, statistics = ctx.saved_tensors
    q_width, k_width = ctx.widths
    grads = [g if g is None else dense_rows(g) for g in (grad_q, grad_k, grad_v)]
    grad_qkv, *parameter_grads = operator(*grads, qkv, q_width, k_width, ctx.clip, q_weight, k_weight, statistics)
    parameter_grads = [None if t is None else g.to(t) for g, t in zip(parameter_grads, ctx.parameters, strict=True)]
    return grad_qkv, None, None, None, *parameter_grads, None


def _clip_qk_layernorm_backward(*arguments):
    return clip_qk_layernorm_gradients(torch.ops.internvl.clip_qk_layernorm_backward.default, *arguments)


def refuse_second_derivatives(_ctx, *_grads):
    """Without it PyTorch only warns, and goes on with a wrong gradient."""
    raise NotImplementedError("clip_qk_layernorm: second derivatives are not implemented")


def below_autograd(operator, *arguments, **options):
    """Calls the operator past its Python autograd kernel when no gradient is wanted."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*arguments, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments, **options)


def prefix_attn(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """``torch.ops.internvl.prefix_attn``, skipping the Python autograd kernel when no gradient is wanted."""
    return below_autograd(torch.ops.internvl.prefix_attn.default, q, k, v, **options)


def clip_qk_layernorm(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.internvl.clip_qk_layernorm``, with the same short way when no gradient is wanted."""
    return below_autograd(torch.ops.internvl.clip_qk_layernorm.default, *arguments)


def _register() -> torch.library.Library:
    library = torch.library.Library("internvl", "IMPL")
    library.impl("prefix_attn", _prefix_attn_autograd, "Autograd", with_keyset=True)
    for device_type in ("cpu", "cuda"):
        key = f"Autocast{device_type.upper()}"
        rule = prefix_attn_autocast(torch.ops.internvl.prefix_attn.default, device_type)
        library.impl("prefix_attn", rule, key, with_keyset=True)
    torch.library.register_fake("internvl::prefix_attn", _fake_prefix_attn)
    torch.library.register_fake("internvl::prefix_attn_backward", _fake_prefix_attn_backward)
    torch.library.register_fake("internvl::clip_qk_layernorm", fake_clip_qk_layernorm)
    torch.library.register_fake("internvl::clip_qk_layernorm_backward", fake_clip_qk_layernorm_backward)
    torch.library.register_autograd(
        "internvl::clip_qk_layernorm", _clip_qk_layernorm_backward, setup_context=save_clip_qk_layernorm
    )
    torch.library.register_autograd("internvl::clip_qk_layernorm_backward", refuse_second_derivatives)
    return library


LIBRARY_ERROR = _load()
ISA_ERROR = None if LIBRARY_ERROR else _isa_error()  # INTERNVL_CPU_ISA names what does not run here
_LIBRARY = None if LIBRARY_ERROR else _register()
# Read once: a tracer that follows the choice of a backend must meet plain data.
_BUILD_INFO: dict = {} if LIBRARY_ERROR else dict(importlib.import_module("internvl_kernels._C").build_info())
