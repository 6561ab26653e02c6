"""MPT attention under the public names of the original module: only the import line of a script changes."""

from __future__ import annotations

from torch import Tensor, nn

from ...functional import clip_qk_layernorm
from .alibi import attn_bias_shape, build_alibi_bias, build_attn_bias, check_attn_impl, gen_slopes
from .bias import AttnBias
from .cache import CacheSlot
from .eager import scaled_multihead_dot_product_attention
from .fused import flash_attn_fn, triton_flash_attn_fn
from .norm import LPLayerNorm

__all__ = [
    "ATTN_CLASS_REGISTRY",
    "AttnBias",
    "CacheSlot",
    "MultiQueryAttention",
    "MultiheadAttention",
    "attn_bias_shape",
    "build_alibi_bias",
    "build_attn_bias",
    "flash_attn_fn",
    "gen_slopes",
    "scaled_multihead_dot_product_attention",
    "triton_flash_attn_fn",
]

_FUNCTIONS = {
    "torch": scaled_multihead_dot_product_attention,
    "flash": flash_attn_fn,
    "triton": triton_flash_attn_fn,
}


class _FusedProjectionAttention(nn.Module):
    """Attention behind one fused QKV projection; subclasses say how many key-value heads there are."""

    multiquery: bool

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        attn_impl: str = "triton",
        clip_qkv: float | None = None,
        qk_ln: bool = False,
        softmax_scale: float | None = None,
        attn_pdrop: float = 0.0,
        low_precision_layernorm: bool = False,
        verbose: int = 0,
        device=None,
    ):
        super().__init__()
        check_attn_impl(attn_impl)
        self.attn_impl = attn_impl
        self.clip_qkv = clip_qkv
        self.qk_ln = qk_ln
        self.d_model = d_model
        self.n_heads = n_heads
        self.head_dim = d_model // n_heads
        self.kv_width = self.head_dim if self.multiquery else d_model
        self.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.attn_dropout_p = attn_pdrop
        self.Wqkv = nn.Linear(d_model, d_model + 2 * self.kv_width, device=device)
        self.Wqkv._fused = (0, (d_model, d_model + self.kv_width))  # each slice is initialised on its own
        if qk_ln:
            norm = LPLayerNorm if low_precision_layernorm else nn.LayerNorm
            self.q_ln = norm(d_model, device=device)
            self.k_ln = norm(self.kv_width, device=device)
        self.out_proj = nn.Linear(d_model, d_model, device=device)
        self.out_proj._is_residual = True

    def forward(
        self,
        x: Tensor,
        past_key_value=None,
        attn_bias: Tensor | AttnBias | None = None,
        attention_mask: Tensor | None = None,
        is_causal: bool = True,
        needs_weights: bool = False,
    ):
        """Self-attention of x [B, S, d_model].

        Args:
            past_key_value: a slot of ``cache.py`` in the layout of ``attn_impl``.
            attn_bias: dense bias, or ``AttnBias`` (any implementation; the fused ones never make it dense).
            attention_mask: [B, T] bool, True = real key.
            is_causal: hide the future.
            needs_weights: also return the weights; only ``attn_impl='torch'`` has them.
        Returns: output [B, S, d_model]; weights [B, H, S, T] or None; the cache slot or None.
        Raises: as the function behind ``attn_impl``.
        """
        query, key, value = self._project(x)
        context, weights, past_key_value = _FUNCTIONS[self.attn_impl](
            query,
            key,
            value,
            self.n_heads,
            past_key_value=past_key_value,
            softmax_scale=self.softmax_scale,
            attn_bias=attn_bias,
            key_padding_mask=attention_mask,
            is_causal=is_causal,
            dropout_p=self.attn_dropout_p,
            training=self.training,
            needs_weights=needs_weights,
            multiquery=self.multiquery,
        )
        return self.out_proj(context), weights, past_key_value

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, d_model], k and v [B, S, kv_width]: clipped, q and k normalised over their full width."""
        qkv = self.Wqkv(x)
        clip = self.clip_qkv or None  # 0 means off
        if self.attn_impl != "torch" and (clip or self.qk_ln):
            norms = (None,) * 4
            eps = 1e-5
            if self.qk_ln:
                norms = (self.q_ln.weight, self.q_ln.bias, self.k_ln.weight, self.k_ln.bias)
                eps = self.q_ln.eps
            return clip_qk_layernorm(qkv, self.d_model, self.kv_width, clip, *norms, eps=eps)
        if clip:
            qkv = qkv.clamp(min=-clip, max=clip)
        query, key, value = qkv.split([self.d_model, self.kv_width, self.kv_width], dim=2)
        if self.qk_ln:
            dtype = query.dtype
            query, key = self.q_ln(query).to(dtype), self.k_ln(key).to(dtype)
        return query, key, value


class MultiheadAttention(_FusedProjectionAttention):
    """Multi-head self-attention; ``Wqkv.weight`` [3 * d_model, d_model], rows q, k, v.

    Args:
        d_model, n_heads: width and head count; d_model a multiple of n_heads.
        attn_impl: 'torch' (eager), 'flash' (compiled kernels), 'triton' (Triton kernels on a GPU, the compiled
            CPU kernel on CPU tensors).
        clip_qkv: clamp the fused projection to [-clip_qkv, clip_qkv]; None or 0: off.
        qk_ln: LayerNorm on q and k over their full width, before the head split.
        softmax_scale: Default: 1 / sqrt(d_model / n_heads).
        attn_pdrop: attention dropout; 'torch' only while training.
        low_precision_layernorm: the qk LayerNorms run in the autocast dtype.
        verbose: accepted, without effect.
    Raises: ValueError (unknown ``attn_impl``).
    """

    multiquery = False


class MultiQueryAttention(_FusedProjectionAttention):
    """Multi-query self-attention: one key-value head. ``Wqkv.weight`` [d_model + 2 * head_dim, d_model].

    Arguments and errors as ``MultiheadAttention``; ``k_ln`` is over head_dim.
    """

    multiquery = True


ATTN_CLASS_REGISTRY = {
    "multihead_attention": MultiheadAttention,
    "multiquery_attention": MultiQueryAttention,
}
