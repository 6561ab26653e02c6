"""Launches of the attention kernels: from checked tensors to results. No device value is read."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from . import configs
from .call import Call, KeyTiles, key_tiles
from .configs import Config
from .prefix_attn_bwd import bwd_dkdv_kernel, bwd_preprocess_kernel
from .prefix_attn_bwd_dq import bwd_dq_kernel, bwd_slopes_kernel
from .prefix_attn_fwd import combine_kernel, prefix_attn_fwd_kernel

MAX_SPLITS = 128
MIN_TILES_PER_SPLIT = 4
MAX_PACKED_ROWS = 64  # queries of a group that count as decoding


def _splits(blocks: int, key_tiles_: int, processors: int) -> int:
    """Shares of the keys: enough blocks for two waves, each with a few tiles; 1 when the rows alone occupy the GPU."""
    if blocks * 5 >= processors * 4:
        return 1
    return max(1, min(triton.cdiv(2 * processors, blocks), key_tiles_ // MIN_TILES_PER_SPLIT, MAX_SPLITS))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Sq, Hq, D] in q's dtype and lse [B, Hq, Sq] fp32, both contiguous."""
    out = call.q.new_empty(call.q.shape)
    lse = call.q.new_empty((call.batch, call.heads_q, call.seqlen_q), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    packed = call.seqlen_q * call.group <= MAX_PACKED_ROWS
    config = call.config("decode" if packed else "fwd")
    pack = call.group if packed else 1
    row_tiles = triton.cdiv(call.seqlen_q * pack, config.block_m)
    blocks = row_tiles * call.batch * (call.heads_q // pack)
    splits = 1
    if packed:
        processors = configs.multiprocessors(call.q.device.type, call.q.device.index)
        splits = _splits(blocks, triton.cdiv(call.seqlen_k, config.block_n), processors)
    prune = call.prune and not packed
    tiles = key_tiles(call, config.block_n, prune)
    target, target_lse = out, lse
    if splits > 1:
        target = call.q.new_empty((splits, *call.q.shape), dtype=torch.float32)
        target_lse = lse.new_empty((splits, *lse.shape))
    stride_b, stride_s, stride_h = out.stride()[:3]
    wrap_triton(prefix_attn_fwd_kernel)[(blocks, splits)](
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        out_ptr=target,
        lse_ptr=target_lse,
        **call.pointers,
        **tiles.pointers,
        **call.strides(q=call.q, k=call.k, v=call.v),
        stride_ob=stride_b,
        stride_os=stride_s,
        stride_oh=stride_h,
        stride_osplit=out.numel(),
        stride_lsplit=lse.numel(),
        heads_q=call.heads_q,
        heads_kv=call.heads_kv,
        softmax_scale=call.softmax_scale,
        row_tiles=row_tiles,
        section=call.section() // pack if not packed else call.batch * call.heads_q,
        **call.sizes,
        **call.constants,
        **_blocks(call, config),
        PACK=pack,
        PRUNE=prune,
    )
    if splits > 1:
        wrap_triton(combine_kernel)[(lse.numel(),)](
            partial_ptr=target,
            partial_lse_ptr=target_lse,
            out_ptr=out,
            lse_ptr=lse,
            splits=splits,
            rows=lse.numel(),
            heads_q=call.heads_q,
            seqlen_q=call.seqlen_q,
            HEAD_DIM=call.head_dim,
            BLOCK_D=call.block_d,
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return out, lse


def _blocks(call: Call, config: Config) -> dict[str, int | bool]:
    return {
        "HEAD_DIM": call.head_dim,
        "BLOCK_D": call.block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CHUNK": configs.of_gpu(configs.CHUNK, call.gpu),
        "ALIBI": call.alibi_slopes is not None,
        **config.options,
    }


def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, slopes_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in q's dtype and dalibi_slopes fp32 ([0] when it is not wanted), contiguous."""
    dq, dk, dv = (t.new_empty(t.shape) for t in (call.q, call.k, call.v))
    learned = call.alibi_slopes is not None and slopes_grad
    slopes = call.q.new_empty((call.heads_q if learned else 0,), dtype=torch.float32)
    if call.q.numel() == 0 or call.k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), slopes.zero_()
    config = call.config("dkdv")
    row_tiles = triton.cdiv(call.seqlen_q, config.block_m)
    delta = torch.empty_like(lse)
    query_norms, query_lse = (lse.new_empty((call.batch, call.heads_q, row_tiles)) for _ in range(2))
    query_segments = call.none.new_empty((call.batch, call.heads_q, row_tiles, 2), dtype=torch.int64)
    wrap_triton(bwd_preprocess_kernel)[(row_tiles, call.batch * call.heads_q)](
        q_ptr=call.q,
        out_ptr=out,
        grad_out_ptr=grad_out,
        lse_ptr=lse,
        grad_lse_ptr=lse if grad_lse is None else grad_lse,
        delta_ptr=delta,
        query_norm_ptr=query_norms,
        query_lse_ptr=query_lse,
        query_segments_ptr=query_segments,
        query_start_ptr=call.rows["query_start_ptr"],
        segment_ids_ptr=call.pointers["segment_ids_ptr"],
        **call.strides(q=call.q, o=out, g=grad_out),
        heads_q=call.heads_q,
        seqlen_q=call.seqlen_q,
        seqlen_k=call.seqlen_k,
        terms=call.terms,
        HEAD_DIM=call.head_dim,
        BLOCK_D=call.block_d,
        BLOCK_M=config.block_m,
        GRAD_LSE=grad_lse is not None,
        PRUNE=call.prune,
        SEGMENTS=call.segment_ids is not None,
        num_warps=configs.row_warps(call.head_dim),
    )
    tensors = {"q_ptr": call.q, "k_ptr": call.k, "v_ptr": call.v, "grad_out_ptr": grad_out, "lse_ptr": lse}
    common = {
        **tensors,
        "delta_ptr": delta,
        **call.pointers,
        **call.strides(q=call.q, k=call.k, v=call.v, g=grad_out),
        "heads_q": call.heads_q,
        "heads_kv": call.heads_kv,
        "softmax_scale": call.softmax_scale,
        **call.sizes,
        **call.constants,
        "PRUNE": call.prune,
    }
    tiles = key_tiles(call, config.block_n, norms=False)
    wrap_triton(bwd_dkdv_kernel)[(triton.cdiv(call.seqlen_k, config.block_n), call.batch * call.heads_kv)](
        **common,
        dk_ptr=dk,
        dv_ptr=dv,
        summary_ptr=tiles.summary,
        used_ptr=tiles.used,
        query_norm_ptr=query_norms,
        query_lse_ptr=query_lse,
        query_segments_ptr=query_segments,
        row_tiles=row_tiles,
        **_blocks(call, config),
    )
    _backward_dq(call, common, dq, slopes, tiles)
    return dq, dk, dv, slopes


def _backward_dq(call: Call, common: dict, dq: Tensor, slopes: Tensor, earlier: KeyTiles) -> None:
    config = call.config("dq")
    row_tiles = triton.cdiv(call.seqlen_q, config.block_m)
    learned = slopes.numel() > 0
    shares = slopes.new_empty((call.batch, call.heads_q, row_tiles) if learned else (1,))
    tiles = key_tiles(call, config.block_n, call.prune, earlier)
    wrap_triton(bwd_dq_kernel)[(row_tiles * call.batch * call.heads_q,)](
        **common,
        dq_ptr=dq,
        slope_shares_ptr=shares,
        **tiles.pointers,
        row_tiles=row_tiles,
        section=call.section(),
        **_blocks(call, config),
        SLOPE_GRAD=learned,
    )
    if learned:
        wrap_triton(bwd_slopes_kernel)[(call.heads_q,)](
            shares_ptr=shares,
            dslopes_ptr=slopes,
            batch=call.batch,
            heads_q=call.heads_q,
            row_tiles=row_tiles,
            BLOCK=256,
            num_warps=1,
        )
