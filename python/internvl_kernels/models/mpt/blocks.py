"""The transformer block."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ATTN_CLASS_REGISTRY, AttnBias
from .norm import norm_class


class MPTMLP(nn.Module):
    """``down_proj(gelu(up_proj(x)))`` with the exact GELU."""

    def __init__(self, d_model: int, expansion_ratio: int, device=None):
        super().__init__()
        self.up_proj = nn.Linear(d_model, expansion_ratio * d_model, device=device)
        self.act = nn.GELU(approximate="none")
        self.down_proj = nn.Linear(expansion_ratio * d_model, d_model, device=device)
        self.down_proj._is_residual = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class MPTBlock(GradientCheckpointingLayer):
    """``x + attn(norm_1(x))``, then ``x + ffn(norm_2(x))``; ``attn_config`` as in ``MPTConfig``, may be partial."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        expansion_ratio: int,
        attn_config: dict | None = None,
        resid_pdrop: float = 0.0,
        norm_type: str = "low_precision_layernorm",
        verbose: int = 0,
        device=None,
        layer_norm_epsilon: float = 1e-5,
        **_unused,
    ):
        super().__init__()
        attn_config = attn_config or {}
        norm = norm_class(norm_type)
        attention = ATTN_CLASS_REGISTRY[attn_config.get("attn_type", "multihead_attention")]
        options = ("attn_impl", "clip_qkv", "qk_ln", "softmax_scale", "attn_pdrop")
        self.norm_1 = norm(d_model, eps=layer_norm_epsilon, device=device)
        self.attn = attention(
            d_model=d_model,
            n_heads=n_heads,
            verbose=verbose,
            device=device,
            **{name: attn_config[name] for name in options if name in attn_config},
        )
        self.norm_2 = norm(d_model, eps=layer_norm_epsilon, device=device)
        self.ffn = MPTMLP(d_model, expansion_ratio, device=device)
        self.resid_attn_dropout = nn.Dropout(resid_pdrop)
        self.resid_ffn_dropout = nn.Dropout(resid_pdrop)

    def forward(
        self,
        x: Tensor,
        past_key_value=None,
        attn_bias: Tensor | AttnBias | None = None,
        attention_mask: Tensor | None = None,
        is_causal: bool = True,
        output_attentions: bool = False,
    ):
        """Returns: x [B, S, D]; attention weights or None; the cache slot or None. Arguments as the attention's."""
        attended, weights, past_key_value = self.attn(
            self.norm_1(x),
            past_key_value=past_key_value,
            attn_bias=attn_bias,
            attention_mask=attention_mask,
            is_causal=is_causal,
            needs_weights=output_attentions,
        )
        x = x + self.resid_attn_dropout(attended)
        x = x + self.resid_ffn_dropout(self.ffn(self.norm_2(x)))
        return x, weights, past_key_value
