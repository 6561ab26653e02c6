"""clip_qk_layernorm, forward and backward: one read and one write of the fused projection.

A program holds ROWS whole rows in registers: clamp, then q and k are normalised over their full width with fp32
statistics (mean first, then the squares of the centred values), and v is copied.

    forward    program: ROWS rows; statistics[row] = (q mean, q 1/std, k mean, k 1/std), zeros without that norm
    backward   program: every n-th block of rows (n programs), from the saved statistics and the input; it leaves one
               fp32 row of parameter gradients (dq_weight, dq_bias, dk_weight, dk_bias); ``reduce_kernel`` adds them
"""

import triton
import triton.language as tl

from .tiles import narrow


@triton.jit
def clipped(x, clip, CLIP: tl.constexpr):
    """clamp(x, -clip, clip); NaN passes, as in torch.clamp."""
    if CLIP:
        x = tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))
    return x


@triton.jit
def normalize_part(
    x_ptr, out_ptr, weight_ptr, bias_ptr, statistics_ptr, row, row_stride, inside, clip, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CLIP: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One of q, k, v of ROWS rows: x_ptr points at its first column in row 0."""
    d = tl.arange(0, BLOCK)
    in_width = (d < WIDTH)[None, :]
    keep = inside[:, None] & in_width
    x = tl.load(x_ptr + row[:, None] * row_stride + d[None, :], mask=keep, other=0.0)
    y = clipped(x.to(tl.float32), clip, CLIP)
    if NORM:
        mean = tl.sum(y, 1) / WIDTH
        centred = tl.where(in_width, y - mean[:, None], 0.0)
        inverse_std = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + eps)
        y = centred * inverse_std[:, None] * tl.load(weight_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            y += tl.load(bias_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
        tl.store(statistics_ptr + row * 4, mean, mask=inside)
        tl.store(statistics_ptr + row * 4 + 1, inverse_std, mask=inside)
    else:
        tl.store(statistics_ptr + row * 4, tl.zeros(row.shape, tl.float32), mask=inside)
        tl.store(statistics_ptr + row * 4 + 1, tl.zeros(row.shape, tl.float32), mask=inside)
    tl.store(out_ptr + row[:, None] * WIDTH + d[None, :], narrow(y, out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows"])
def clip_qk_layernorm_fwd_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, statistics_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    rows, stride_row, clip, eps,
    Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    CLIP: tl.constexpr, Q_NORM: tl.constexpr, Q_BIAS: tl.constexpr, K_NORM: tl.constexpr, K_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    normalize_part(
        qkv_ptr, q_ptr, q_weight_ptr, q_bias_ptr, statistics_ptr, row, stride_row, inside, clip, eps,
        Q_WIDTH, BLOCK_Q, CLIP, Q_NORM, Q_BIAS,
    )  # fmt: skip
    normalize_part(
        qkv_ptr + Q_WIDTH, k_ptr, k_weight_ptr, k_bias_ptr, statistics_ptr + 2, row, stride_row, inside, clip, eps,
        K_WIDTH, BLOCK_K, CLIP, K_NORM, K_BIAS,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_K)
    keep = inside[:, None] & (d < K_WIDTH)[None, :]
    x = tl.load(qkv_ptr + Q_WIDTH + K_WIDTH + row[:, None] * stride_row + d[None, :], mask=keep, other=0.0)
    v = narrow(clipped(x.to(tl.float32), clip, CLIP), v_ptr.dtype.element_ty)
    tl.store(v_ptr + row[:, None] * K_WIDTH + d[None, :], v, mask=keep)


@triton.jit
def part_gradient(
    x_ptr, grad_ptr, out_ptr, weight, statistics_ptr, dweight, dbias, row, stride_row, stride_grad, inside, clip,
    TOTAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CLIP: tl.constexpr, NORM: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """The gradient of one of q, k, v; 0 outside the clip. dweight and dbias [BLOCK] grow by these rows."""
    d = tl.arange(0, BLOCK)
    in_width = (d < WIDTH)[None, :]
    keep = inside[:, None] & in_width
    x = tl.load(x_ptr + row[:, None] * stride_row + d[None, :], mask=keep, other=0.0).to(tl.float32)
    if GIVEN:
        dy = tl.load(grad_ptr + row[:, None] * stride_grad + d[None, :], mask=keep, other=0.0).to(tl.float32)
    else:
        dy = tl.zeros(x.shape, tl.float32)
    dx = dy
    if NORM:
        mean = tl.load(statistics_ptr + row * 4, mask=inside, other=0.0)
        inverse_std = tl.load(statistics_ptr + row * 4 + 1, mask=inside, other=0.0)
        centred = tl.where(keep, clipped(x, clip, CLIP) - mean[:, None], 0.0)
        normal = centred * inverse_std[:, None]
        scaled = dy * weight[None, :]
        mean_grad = tl.sum(scaled, 1) / WIDTH
        mean_dot = tl.sum(scaled * normal, 1) / WIDTH
        dx = (scaled - mean_grad[:, None] - normal * mean_dot[:, None]) * inverse_std[:, None]
        dweight += tl.sum(dy * normal, 0)
        dbias += tl.sum(dy, 0)
    if CLIP:
        dx = tl.where((x >= -clip) & (x <= clip), dx, 0.0)
    tl.store(out_ptr + row[:, None] * TOTAL + d[None, :], narrow(dx, out_ptr.dtype.element_ty), mask=keep)
    return dweight, dbias


@triton.jit
def store_sums(sums_ptr, dweight, dbias, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    tl.store(sums_ptr + d, dweight, mask=d < WIDTH)
    tl.store(sums_ptr + WIDTH + d, dbias, mask=d < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def clip_qk_layernorm_bwd_kernel(
    grad_q_ptr, grad_k_ptr, grad_v_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, statistics_ptr, grad_qkv_ptr, sums_ptr,
    rows, stride_row, stride_gq, stride_gk, stride_gv, clip,
    Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    CLIP: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    GRAD_Q: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
):  # fmt: skip
    TOTAL: tl.constexpr = Q_WIDTH + 2 * K_WIDTH
    wide, narrow = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_weight = tl.zeros((BLOCK_Q,), tl.float32)
    k_weight = tl.zeros((BLOCK_K,), tl.float32)
    if Q_NORM:
        q_weight = tl.load(q_weight_ptr + wide, mask=wide < Q_WIDTH, other=0.0).to(tl.float32)
    if K_NORM:
        k_weight = tl.load(k_weight_ptr + narrow, mask=narrow < K_WIDTH, other=0.0).to(tl.float32)
    dq_weight, dq_bias = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    dk_weight, dk_bias = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    dv_weight, dv_bias = k_weight, k_weight
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < rows
        dq_weight, dq_bias = part_gradient(
            qkv_ptr, grad_q_ptr, grad_qkv_ptr, q_weight, statistics_ptr, dq_weight, dq_bias,
            row, stride_row, stride_gq, inside, clip, TOTAL, Q_WIDTH, BLOCK_Q, CLIP, Q_NORM, GRAD_Q,
        )  # fmt: skip
        dk_weight, dk_bias = part_gradient(
            qkv_ptr + Q_WIDTH, grad_k_ptr, grad_qkv_ptr + Q_WIDTH, k_weight, statistics_ptr + 2, dk_weight, dk_bias,
            row, stride_row, stride_gk, inside, clip, TOTAL, K_WIDTH, BLOCK_K, CLIP, K_NORM, GRAD_K,
        )  # fmt: skip
        part_gradient(
            qkv_ptr + Q_WIDTH + K_WIDTH, grad_v_ptr, grad_qkv_ptr + Q_WIDTH + K_WIDTH, k_weight, statistics_ptr,
            dv_weight, dv_bias, row, stride_row, stride_gv, inside, clip,
            TOTAL, K_WIDTH, BLOCK_K, CLIP, False, GRAD_V,
        )  # fmt: skip
    sums_ptr += tl.program_id(0).to(tl.int64) * (2 * Q_WIDTH + 2 * K_WIDTH)
    if Q_NORM:
        store_sums(sums_ptr, dq_weight, dq_bias, Q_WIDTH, BLOCK_Q)
    if K_NORM:
        store_sums(sums_ptr + 2 * Q_WIDTH, dk_weight, dk_bias, K_WIDTH, BLOCK_K)


@triton.jit(do_not_specialize=["programs"])
def reduce_kernel(sums_ptr, out_ptr, programs, begin, width, stride, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """out[d] = the sum over programs of sums[program, begin + d], in order."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        keep = (program < programs)[:, None] & inside[None, :]
        at = sums_ptr + program[:, None].to(tl.int64) * stride + begin + d[None, :]
        total += tl.sum(tl.load(at, mask=keep, other=0.0), 0)
    tl.store(out_ptr + d, total, mask=inside)
