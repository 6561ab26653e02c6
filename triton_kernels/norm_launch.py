"""Launches of the clip + QK LayerNorm kernels: from checked tensors to results."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from . import configs
from .clip_qk_layernorm import clip_qk_layernorm_bwd_kernel, clip_qk_layernorm_fwd_kernel, reduce_kernel

MAX_WIDTH = 1 << 18  # a row lives in the registers of one block


def _rows_of(tensor: Tensor) -> Tensor:
    """Equally spaced rows with a contiguous last dimension: a view, or a copy where no view is possible."""
    return tensor.reshape(-1, tensor.shape[-1])


def norm_tile(gpu: tuple[str, ...], q_width: int, k_width: int, backward: bool) -> dict[str, int]:
    """Block sizes and warps of a launch."""
    block_q, block_k = triton.next_power_of_2(q_width), triton.next_power_of_2(k_width)
    widest = max(block_q, block_k)
    rows = max(1, min(16, configs.of_gpu(configs.NORM_TILE, gpu) // widest // (2 if backward else 1)))
    per_warp = 512 if backward else 1024  # elements: 16 or 32 registers of a thread for one part of a row
    warps = max(1, min(32, rows * widest // per_warp))
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "ROWS": rows, "num_warps": warps}


def forward(
    qkv: Tensor, q_width: int, k_width: int, clip: float | None, parameters: dict[str, Tensor | None], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [..., width] contiguous and statistics [..., 4] fp32."""
    lead = qkv.shape[:-1]
    q, k, v = (qkv.new_empty((*lead, width)) for width in (q_width, k_width, k_width))
    statistics = qkv.new_empty((*lead, 4), dtype=torch.float32)
    if qkv.numel() == 0:
        return q, k, v, statistics
    x = _rows_of(qkv)
    tile = norm_tile(configs.gpu_keys(qkv.device.type, qkv.device.index), q_width, k_width, backward=False)
    given = {f"{name}_ptr": q if tensor is None else tensor.contiguous() for name, tensor in parameters.items()}
    wrap_triton(clip_qk_layernorm_fwd_kernel)[(triton.cdiv(x.shape[0], tile["ROWS"]),)](
        qkv_ptr=x,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        statistics_ptr=statistics,
        **given,
        rows=x.shape[0],
        stride_row=x.stride(0),
        clip=0.0 if clip is None else clip,
        eps=eps,
        Q_WIDTH=q_width,
        K_WIDTH=k_width,
        CLIP=clip is not None,
        Q_NORM=parameters["q_weight"] is not None,
        Q_BIAS=parameters["q_bias"] is not None,
        K_NORM=parameters["k_weight"] is not None,
        K_BIAS=parameters["k_bias"] is not None,
        **tile,
    )
    return q, k, v, statistics


def backward(
    grads: dict[str, Tensor | None],
    qkv: Tensor,
    q_width: int,
    k_width: int,
    clip: float | None,
    weights: dict[str, Tensor | None],
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_qkv like qkv, contiguous; dq_weight, dq_bias, dk_weight, dk_bias in fp32 ([0] without that norm)."""
    grad_qkv = qkv.new_empty(qkv.shape)
    widths = {"q": q_width, "k": k_width}
    parts = [(p, widths[p]) for p in "qk" for _ in range(2)]
    outs = [
        qkv.new_empty((width if weights[f"{p}_weight"] is not None else 0,), dtype=torch.float32) for p, width in parts
    ]
    if qkv.numel() == 0:
        return grad_qkv, *(out.zero_() for out in outs)
    x = _rows_of(qkv)
    gpu = configs.gpu_keys(qkv.device.type, qkv.device.index)
    tile = norm_tile(gpu, q_width, k_width, backward=True)
    programs = min(triton.cdiv(x.shape[0], tile["ROWS"]), configs.of_gpu(configs.NORM_BACKWARD_PROGRAMS, gpu))
    columns = 2 * q_width + 2 * k_width
    sums = qkv.new_empty((programs, columns), dtype=torch.float32)
    spaced = {name: qkv if grad is None else _rows_of(grad) for name, grad in grads.items()}
    wrap_triton(clip_qk_layernorm_bwd_kernel)[(programs,)](
        **{f"{name}_ptr": grad for name, grad in spaced.items()},
        qkv_ptr=x,
        **{f"{name}_ptr": qkv if weight is None else weight.contiguous() for name, weight in weights.items()},
        statistics_ptr=statistics.contiguous(),
        grad_qkv_ptr=grad_qkv,
        sums_ptr=sums,
        rows=x.shape[0],
        stride_row=x.stride(0),
        **{f"stride_g{n}": spaced[f"grad_{n}"].stride(0) for n in "qkv"},
        clip=0.0 if clip is None else clip,
        Q_WIDTH=q_width,
        K_WIDTH=k_width,
        CLIP=clip is not None,
        Q_NORM=weights["q_weight"] is not None,
        K_NORM=weights["k_weight"] is not None,
        **{f"GRAD_{n.upper()}": grads[f"grad_{n}"] is not None for n in "qkv"},
        **tile,
    )
    begin = 0
    for (_, width), out in zip(parts, outs, strict=True):
        if out.numel():
            wrap_triton(reduce_kernel)[(triton.cdiv(width, 64),)](
                sums_ptr=sums,
                out_ptr=out,
                programs=programs,
                begin=begin,
                width=width,
                stride=columns,
                BLOCK=64,
                PROGRAMS=16,
                num_warps=4,
            )
        begin += width
    return grad_qkv, *outs
