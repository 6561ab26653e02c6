"""``torch.ops.internvl_triton``: the Triton kernels as PyTorch operators, with fake, autograd and autocast rules.

Arguments, results and errors are those of ``torch.ops.internvl``. The operators are ``torch.library.triton_op``, so
that ``torch.compile`` sees the kernels; in the interpreter (TRITON_INTERPRET=1) they are opaque: nothing can trace it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, registration, variables
from . import launch, norm_launch
from .tiles import INTERPRET

NAMESPACE = "internvl_triton"
_operator = torch.library.custom_op if INTERPRET.value else torch.library.triton_op
TERMS = ("prefix_len", "key_range", "query_start", "key_flags", "segment_ids", "alibi_slopes")


def _call(q, k, v, terms: dict[str, Tensor | None], softmax_scale: float | None, window: int) -> launch.Call:
    scale = checks.prefix_attn(q, k, v, terms, softmax_scale, window)
    if INTERPRET.value:
        checks.key_range_values(terms["key_range"])
    terms = {name: tensor if tensor is None else tensor.contiguous() for name, tensor in terms.items()}
    return launch.Call(q, k, v, **terms, softmax_scale=scale, window=window, prune=variables.alibi_prune())


@_operator(f"{NAMESPACE}::prefix_attn", mutates_args=())
def _prefix_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_len: Tensor | None = None,
    key_range: Tensor | None = None,
    query_start: Tensor | None = None,
    key_flags: Tensor | None = None,
    segment_ids: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    terms = (prefix_len, key_range, query_start, key_flags, segment_ids, alibi_slopes)
    return launch.forward(_call(q, k, v, dict(zip(TERMS, terms, strict=True)), softmax_scale, window))


@_operator(f"{NAMESPACE}::prefix_attn_backward", mutates_args=())
def _prefix_attn_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix_len: Tensor | None = None,
    key_range: Tensor | None = None,
    query_start: Tensor | None = None,
    key_flags: Tensor | None = None,
    segment_ids: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int = 0,
    slopes_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms = (prefix_len, key_range, query_start, key_flags, segment_ids, alibi_slopes)
    call = _call(q, k, v, dict(zip(TERMS, terms, strict=True)), softmax_scale, window)
    checks.prefix_attn_gradients(q, grad_out, grad_lse, out, lse)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    return launch.backward(call, grad_out, grad_lse, out, lse.contiguous(), slopes_grad)


def _fake_prefix_attn(q, k, v, *terms, **more):
    named = {**dict(zip((*TERMS, "softmax_scale", "window"), terms, strict=False)), **more}
    checks.traced_prefix_attn("prefix_attn", q, k, v, {n: named.get(n) for n in TERMS})
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _fake_prefix_attn_backward(grad_out, grad_lse, q, k, v, out, lse, *terms, **more):
    names = (*TERMS, "softmax_scale", "window", "slopes_grad")
    named = {**dict(zip(names, terms, strict=False)), **more}
    op = "prefix_attn_backward"
    checks.traced_prefix_attn(op, q, k, v, {n: named.get(n) for n in TERMS})
    checks.devices(op, "q", {"q": q, "grad_out": grad_out, "grad_lse": grad_lse, "out": out, "lse": lse})
    wanted = named.get("alibi_slopes") is not None and named.get("slopes_grad", True)
    slopes = q.new_empty((q.shape[2] if wanted else 0,), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), slopes


def _save_prefix_attn(ctx, inputs, output):
    q, k, v, *terms, softmax_scale, window = inputs
    ctx.save_for_backward(q, k, v, *output, *terms)
    ctx.softmax_scale, ctx.window = softmax_scale, window
    ctx.slopes_grad = terms[-1] is not None and terms[-1].requires_grad
    ctx.set_materialize_grads(False)


def _prefix_attn_gradients(ctx, grad_out, grad_lse):
    if grad_out is None and grad_lse is None:
        return (None,) * 11
    q, k, v, out, lse, *terms = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else registration.dense_rows(grad_out)
    dq, dk, dv, dslopes = torch.ops.internvl_triton.prefix_attn_backward.default(
        grad_out, grad_lse, q, k, v, out, lse, *terms, ctx.softmax_scale, ctx.window, ctx.slopes_grad
    )
    return dq, dk, dv, *(None,) * 5, (dslopes if ctx.slopes_grad else None), None, None


@_operator(f"{NAMESPACE}::clip_qk_layernorm", mutates_args=())
def _clip_qk_layernorm(
    qkv: Tensor,
    q_width: int,
    k_width: int,
    clip: float | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    checks.clip_qk_layernorm(qkv, q_width, k_width, clip, parameters, eps)
    _check_width(q_width, k_width)
    return norm_launch.forward(qkv, q_width, k_width, clip, parameters, eps)


@_operator(f"{NAMESPACE}::clip_qk_layernorm_backward", mutates_args=())
def _clip_qk_layernorm_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    qkv: Tensor,
    q_width: int,
    k_width: int,
    clip: float | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = {"q_weight": q_weight, "q_bias": None, "k_weight": k_weight, "k_bias": None}
    checks.clip_qk_layernorm(qkv, q_width, k_width, clip, weights, 0.0)
    _check_width(q_width, k_width)
    grads = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    checks.clip_qk_layernorm_gradients(qkv, (q_width, k_width), grads, statistics)
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    return norm_launch.backward(grads, qkv, q_width, k_width, clip, weights, statistics)


def _check_width(*widths: int) -> None:
    if max(widths) > norm_launch.MAX_WIDTH:
        allowed = f"at most {norm_launch.MAX_WIDTH} on the triton backend"
        raise ValueError(f"clip_qk_layernorm: q_width is {widths[0]} and k_width is {widths[1]}; allowed: {allowed}")


def _norm_gradients(ctx, grad_q, grad_k, grad_v, grad_statistics):
    operator = torch.ops.internvl_triton.clip_qk_layernorm_backward.default
    return registration.clip_qk_layernorm_gradients(operator, ctx, grad_q, grad_k, grad_v, grad_statistics)


def _refuse_second_derivatives(_ctx, *_grads):
    raise NotImplementedError("prefix_attn: second derivatives are not implemented")


def _register() -> torch.library.Library:
    fakes = {
        _prefix_attn: _fake_prefix_attn,
        _prefix_attn_backward: _fake_prefix_attn_backward,
        _clip_qk_layernorm: registration.fake_clip_qk_layernorm,
        _clip_qk_layernorm_backward: registration.fake_clip_qk_layernorm_backward,
    }
    for operator, fake in fakes.items():
        operator.register_fake(fake)
    _prefix_attn.register_autograd(_prefix_attn_gradients, setup_context=_save_prefix_attn)
    _prefix_attn_backward.register_autograd(_refuse_second_derivatives)
    _clip_qk_layernorm.register_autograd(_norm_gradients, setup_context=registration.save_clip_qk_layernorm)
    _clip_qk_layernorm_backward.register_autograd(registration.refuse_second_derivatives)
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    operator = torch.ops.internvl_triton.prefix_attn.default
    for device_type in ("cpu", "cuda"):
        rule = registration.prefix_attn_autocast(operator, device_type)
        library.impl("prefix_attn", rule, f"Autocast{device_type.upper()}", with_keyset=True)
    return library


_LIBRARY = _register()


def prefix_attn(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """``torch.ops.internvl_triton.prefix_attn``, past the autograd key when no gradient is wanted."""
    return registration.below_autograd(torch.ops.internvl_triton.prefix_attn.default, q, k, v, **options)


def clip_qk_layernorm(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.internvl_triton.clip_qk_layernorm``, with the same short way."""
    return registration.below_autograd(torch.ops.internvl_triton.clip_qk_layernorm.default, *arguments)
